"""Latent parallel: the F latents split over ranks, on a 2-D mesh with data parallelism.

The ranks of a latent group see the same rows and hold F / L latents each, weights and moments. A token's k latents are
the k largest of the whole dictionary, exactly: every rank selects k of its own, the candidates are merged, and each
rank keeps those that are its own. Reconstructions are sums over the group. Communication is a few N x k and N x D
messages per step, none of the size of the weights.

Shape letters: N rows, D d_model, F latents held here, K picks per row, L ranks of the group, R dead latents held here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum
from shared.sae.activations import Encoder, TopK
from shared.sae.config import DictionaryConfig
from shared.sae.latent_shard import LatentShard
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import Optimiser, OptimiserConfig, RowShare, make_optimiser
from shared.sae.variants import VARIANTS
from shared.sae.variants.one_group import OneGroup
from stage_train.config import TrainSchema
from stage_train.step.layouts.base import (
    Layout,
    give_memory,
    gradients,
    joint_norm,
    of_owner,
    scatter_rows,
    sum_over,
    take,
)
from stage_train.step.layouts.split import latents_of_part


class _SumForward(torch.autograd.Function):
    """Sum over the group; every rank computes the same loss from the sum, so the gradient is passed on as it is."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumBackward(torch.autograd.Function):
    """The identity, whose gradient is summed over the group: for what every rank uses on its own latents."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_forward(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The group's sum of each rank's part, for a loss that all ranks then compute alike."""
    total: Tensor = _SumForward.apply(partial, group)  # type: ignore[no-untyped-call]
    return total


def sum_backward(shared: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A replicated tensor, for use on each rank's own latents."""
    same: Tensor = _SumBackward.apply(shared, group)  # type: ignore[no-untyped-call]
    return same


class GroupTopK(TopK):
    """TopK over all latents of the group, of which this rank keeps its own."""

    def __init__(self, config: DictionaryConfig, num_latents: int, group: dist.ProcessGroup) -> None:
        super().__init__(config, num_latents)
        self.group = group

    def select(self, encoder: Encoder, centred_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and local indices [N, k]: column j is the token's j-th largest latent where held here, else -1."""
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        own = min(k, encoder.W_enc.shape[0])
        values_NK, indices_NK = super().select(encoder, centred_ND, own)
        gathered = [torch.empty_like(values_NK) for _ in range(size)]
        dist.all_gather(gathered, values_NK, group=self.group)
        # Stable: among equal values the lower latent comes first, as in one process.
        candidates_NC, places_NC = torch.cat(gathered, dim=1).sort(dim=1, descending=True, stable=True)
        best_NK, places_NK = candidates_NC[:, :k], places_NC[:, :k] - rank * own
        mine = (places_NK >= 0) & (places_NK < own)
        picked_NK = indices_NK.gather(1, places_NK.clamp(0, own - 1))
        return torch.where(mine, best_NK, 0.0), torch.where(mine, picked_NK, -1)


class GroupShard(LatentShard):
    """An equal share of the latents, and the group of ranks that hold the others."""

    def __init__(self, first: int, group: dist.ProcessGroup) -> None:
        self.first, self.group = first, group
        self.num_dead = 0
        """Dead latents of the whole group, as of the last look."""

    def sum_forward(self, partial: Tensor) -> Tensor:
        return sum_forward(partial, self.group)

    def sum_backward(self, shared: Tensor) -> Tensor:
        return sum_backward(shared, self.group)

    def count_dead(self, held: int) -> int:
        return self.num_dead

    def kth_largest(self, values_NR: Tensor, k: int) -> Tensor:
        """Of the candidates of all ranks; every rank sends as many, with zeros where it has fewer."""
        own = min(k, values_NR.shape[1])
        best_NK = values_NR.new_zeros(values_NR.shape[0], k)
        best_NK[:, :own] = values_NR.topk(own, dim=1).values
        gathered = [torch.empty_like(best_NK) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, best_NK, group=self.group)
        return torch.cat(gathered, dim=1).topk(k, dim=1).values[:, -1:]


def shard(objective: Objective, rank: int, group: dist.ProcessGroup) -> Objective:
    """Room for the latents that rank `rank` of the group holds of a whole dictionary, with its way of learning."""
    whole = objective.dictionary
    rows = whole.config.d_latent // dist.get_world_size(group)
    with torch.device("meta"):
        held = type(whole)(whole.config, kernels=whole.kernels, compute_dtype=whole.compute_dtype, num_latents=rows)
        if isinstance(whole.activation, TopK):
            held.activation = GroupTopK(whole.config, rows, group)
        learning = Objective(held, objective.learning)
    learning.shard = GroupShard(rank * rows, group)
    return learning


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
        return latents_of_part(config.d_latent, self.latent)

    def distribute(self, objective: Objective, *, has_values: bool = True) -> Objective:
        """The rank's own latents, taken out of the whole; no other rank than the first has more at any time."""
        self._roles = objective.dictionary.roles()
        own = shard(objective, self.latent_rank, self.latent_group)
        give_memory(own, self.world.device)
        if has_values:
            parts = own.dictionary.state_dict()
            for name in parts:
                whole = take(objective.dictionary, name)
                if self.is_whole(name):
                    if self.world.is_main:
                        parts[name].copy_(whole)
                    dist.broadcast(parts[name], src=0)
                else:
                    scatter_rows(whole, parts[name], self.latent)
        return own

    def is_whole(self, name: str) -> bool:
        """Whether every rank holds all of a tensor, of the dictionary or of the training state."""
        role = of_owner(name, self._roles)
        return role is not None and role.latent_axis is None

    def optimiser(self, objective: Objective, config: OptimiserConfig) -> Optimiser:
        """Of the latents held here."""
        return make_optimiser(objective.dictionary, config, rows=RowShare(self.latent, self._sum_over_latents))

    def _sum_over_latents(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.latent_group)

    def facts(
        self, objective: Objective, parts: Sequence[Tensor], num_tokens: int, k: int | None
    ) -> list[BatchFacts] | None:
        """Every pair of row and latent is on one rank, so counts of pairs add up over all of them."""
        if not objective.needs_facts(cut=len(parts) > 1 or self.stream_world > 1):
            return None
        return objective.facts(parts, num_tokens, k=k, reduce_all=all_reduce_sum, reduce_rows=self._sum_over_dp)

    def _sum_over_dp(self, tensor: Tensor) -> None:
        if self.stream_world > 1:
            dist.all_reduce(tensor, group=self.dp_group)

    def losses(self, objective: Objective, x_ND: Tensor, y_ND: Tensor, inputs: StepInputs) -> Losses:
        """The l0 of a shard counts its own picks: scale it so that the mean over ranks is the whole."""
        losses = super().losses(objective, x_ND, y_ND, inputs)
        losses.metrics["l0"] = losses.metrics["l0"] * self.latent
        return losses

    def reduce_gradients(self, optimiser: Optimiser) -> Tensor:
        """Over the data-parallel ranks that hold the same latents."""
        found = gradients(optimiser)
        if self.stream_world > 1:
            sum_over(found, self.dp_group)
        named = dict(zip(optimiser.parameters, found, strict=True))
        parts = [grad for name, grad in named.items() if not self.is_whole(name)]
        return joint_norm(parts, [grad for name, grad in named.items() if self.is_whole(name)], self.latent_group)

    def merge_dead(self, tokens_since_fired_F: Tensor) -> None:
        """Over the ranks that hold the same latents."""
        if self.stream_world > 1:
            dist.all_reduce(tokens_since_fired_F, dist.ReduceOp.MIN, group=self.dp_group)

    def look_at_dead(self, objective: Objective, dead_now_F: Tensor, turn: int) -> Tensor:
        """Also counts the whole group's, so that all its ranks agree whether AuxK is on."""
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
