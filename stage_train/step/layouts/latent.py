"""Latent parallel: the F latents split over ranks, on a 2-D mesh with data parallelism.

The ranks of a latent group see the same rows and hold F / L latents each, weights and moments. A token's k latents are
the k largest of the whole dictionary, exactly: every rank selects k of its own, the candidates are merged, and each
rank keeps those that are its own. Reconstructions are sums over the group. Communication is a few N x k and N x D
messages per step, none of the size of the weights.

Shape letters: N rows, D d_model, F latents held here, L ranks of the group, R dead latents held here.
"""

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import Optimiser, OptimiserConfig, RowShare, make_optimiser
from shared.sae.variants import VARIANTS
from shared.sae.variants.base import Dictionary
from shared.sae.variants.one_group import OneGroup
from stage_train.config import TrainSchema
from stage_train.step.layouts.base import (
    Layout,
    Making,
    give_memory,
    gradients,
    joint_norm,
    of_owner,
    scatter_rows,
    sum_over,
    take,
)
from stage_train.step.layouts.part import GroupShard, part_of
from stage_train.step.layouts.split import latents_of_part


class LatentParallel(Layout):
    """A mesh of dp x latent ranks."""

    def __init__(self, world: World, latent: int) -> None:
        """`latent` divides the number of ranks; see ``share.latent_parts``."""
        super().__init__(world)
        self.mesh = init_device_mesh(world.device.type, (world.size // latent, latent), mesh_dim_names=("dp", "latent"))
        self.latent = latent
        self.dp_group, self.latent_group = self.mesh.get_group("dp"), self.mesh.get_group("latent")
        self.latent_rank = self.mesh.get_local_rank("latent")

    @property
    def stream_rank(self) -> int:
        """The ranks of a latent group read the same rows."""
        return self.mesh.get_local_rank("dp")

    @property
    def stream_world(self) -> int:
        """Latent groups."""
        return self.world.size // self.latent

    def check(self, config: DictionaryConfig, cfg: TrainSchema) -> None:
        """Latents that lie layer by layer are not cut, be it one layer. Raises GranaryError for those too."""
        super().check(config, cfg)
        if not issubclass(VARIANTS[config.kind], OneGroup):
            raise GranaryError(
                f"parallel=latent splits the one group of latents of other dictionaries, a {config.kind} has its "
                "latents layer by layer: use parallel=layers, ddp or fsdp"
            )

    def num_latents(self, config: DictionaryConfig) -> int:
        """An equal share of them. Raises GranaryError when there is none."""
        config.check_parts(self.latent)
        return latents_of_part(config.d_latent, self.latent)

    def begins_in_parts(self, config: DictionaryConfig) -> bool:
        """It has one group of latents."""
        return True

    def own_part(self, config: DictionaryConfig, learning: LearningConfig, **how: Unpack[Making]) -> Objective:
        """The rank's own latents."""
        return part_of(config, learning, self.latent_group, **how)

    def distribute(self, objective: Objective, *, has_values: bool = True) -> Objective:
        """The rank's own latents; out of a whole, no other rank than the first has more at any time."""
        made = objective.dictionary
        self._roles = made.roles()
        if isinstance(objective.shard, GroupShard):
            give_memory(objective, self.world.device)
            if has_values:
                self._agree(made)
            return objective
        with torch.device("meta"):
            own = part_of(
                made.config, objective.learning, self.latent_group,
                kernels=made.kernels, compute_dtype=made.compute_dtype,
            )  # fmt: skip
        give_memory(own, self.world.device)
        if has_values:
            parts = own.dictionary.state_dict()
            for name in parts:
                whole = take(made, name)
                if self.is_whole(name):
                    if self.world.is_main:
                        parts[name].copy_(whole)
                    dist.broadcast(parts[name], src=0)
                else:
                    scatter_rows(whole, parts[name], self.latent)
        return own

    def _agree(self, made: Dictionary) -> None:
        """What several ranks made alike is one rank's, also where processors differ in how they round."""
        for name, tensor in made.state_dict().items():
            if self.is_whole(name):
                dist.broadcast(tensor, src=0)
            elif self.stream_world > 1:
                dist.broadcast(tensor, dist.get_global_rank(self.dp_group, 0), self.dp_group)

    def is_whole(self, name: str) -> bool:
        """Whether every rank holds all of a tensor, of the dictionary or of the training state."""
        role = of_owner(name, self._roles)
        return role is not None and role.latent_axis is None

    def optimiser(self, objective: Objective, config: OptimiserConfig) -> Optimiser:
        """Build that of the latents held here."""
        return make_optimiser(objective.dictionary, config, rows=RowShare(self.latent, self._sum_over_latents))

    def _sum_over_latents(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.latent_group)

    def facts(
        self, objective: Objective, parts: Sequence[Given], num_tokens: int, k: int | None
    ) -> list[BatchFacts] | None:
        """Every pair of row and latent is on one rank, so counts of pairs add up over all of them."""
        if not objective.needs_facts(cut=len(parts) > 1 or self.stream_world > 1):
            return None
        return objective.facts(parts, num_tokens, k=k, reduce_all=all_reduce_sum, reduce_rows=self._sum_over_dp)

    def _sum_over_dp(self, tensor: Tensor) -> None:
        if self.stream_world > 1:
            dist.all_reduce(tensor, group=self.dp_group)

    def losses(self, objective: Objective, x: Given, y_ND: Tensor, inputs: StepInputs) -> Losses:
        """The l0 of a shard counts its own picks: scale it so that the mean over ranks is the whole."""
        losses = super().losses(objective, x, y_ND, inputs)
        losses.metrics["l0"] = losses.metrics["l0"] * self.latent
        return losses

    def reduce_gradients(self, optimiser: Optimiser) -> Tensor:
        """Sum gradients over the data-parallel ranks that hold the same latents."""
        found = gradients(optimiser)
        if self.stream_world > 1:
            sum_over(found, self.dp_group)
        named = dict(zip(optimiser.parameters, found, strict=True))
        parts = [grad for name, grad in named.items() if not self.is_whole(name)]
        return joint_norm(parts, [grad for name, grad in named.items() if self.is_whole(name)], self.latent_group)

    def merge_dead(self, tokens_since_fired_F: Tensor) -> None:
        """Take the smallest counts of the ranks that hold the same latents."""
        if self.stream_world > 1:
            dist.all_reduce(tokens_since_fired_F, dist.ReduceOp.MIN, group=self.dp_group)

    def look_at_dead(self, objective: Objective, dead_now_F: Tensor, turn: int) -> Tensor:
        """Count the whole group's dead latents too, so that all its ranks agree whether AuxK is on."""
        own_R = super().look_at_dead(objective, dead_now_F, turn)
        count = dead_now_F.new_tensor(len(own_R), dtype=torch.int64)
        dist.all_reduce(count, group=self.latent_group)
        assert isinstance(objective.shard, GroupShard)
        objective.shard.num_dead = int(count)
        return own_R

    def mean_over_latents(self, held: Tensor) -> float:
        """All ranks hold equally many."""
        mean = held.mean()
        dist.all_reduce(mean, group=self.latent_group)
        return float(mean) / self.latent

    def as_global(self, objective: Objective, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything with one row per latent is a shard of the whole."""
        seen = {}
        for name, tensor in tensors.items():
            if name not in ("optim.num_steps", "metrics.sums") and not self.is_whole(name):
                tensor = DTensor.from_local(tensor, self.mesh, [Replicate(), Shard(0)], run_check=False)
            seen[name] = tensor
        return seen
