"""Fully sharded data parallel (FSDP2): weights, gradients and moments cut by rows over the ranks.

Each rank reads its share of a batch; the weights are gathered for a forward and backward, and the gradients are
summed and scattered. The update runs on the rank's own rows, which the unit-norm decoder allows: its rows are whole.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shared.basics.errors import GranaryError
from shared.parallel import World, all_reduce_sum
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.inputs import Losses, StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import Optimiser, OptimiserConfig, RowShare, make_optimiser
from shared.sae.roles import Role
from shared.sae.variants.base import Dictionary
from stage_train.config import TrainSchema
from stage_train.step.layouts.base import Layout, Making, give_memory, joint_norm, scatter_rows, take
from stage_train.step.layouts.part import GroupShard, part_of
from stage_train.step.layouts.split import latents_of_shard


class LocalRows:
    """The rank's own rows of a sharded dictionary, as plain tensors for the optimiser."""

    def __init__(self, objective: Objective) -> None:
        self.kernels, self._roles = objective.dictionary.kernels, objective.dictionary.roles()
        parameters = objective.dictionary.named_parameters()
        self.sharded = {name: parameter for name, parameter in parameters if isinstance(parameter, DTensor)}
        self.rows = {name: parameter.to_local().detach() for name, parameter in self.sharded.items()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and parameters as an optimiser asks for them."""
        yield from self.rows.items()

    def roles(self) -> Mapping[str, Role]:
        """Those of the whole SAE."""
        return self._roles


class FullySharded(Layout):
    """FSDP2 over all ranks."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp",))
        self._local: LocalRows | None = None

    def begins_in_parts(self, config: DictionaryConfig) -> bool:
        """Where one group of latents is cut; the first rank makes a CLT, of whose layers ``layers`` deals each to its
        owner."""
        return config.num_groups == 1

    def check(self, config: DictionaryConfig, cfg: TrainSchema) -> None:
        """Raises GranaryError also where rows do not learn each by itself."""
        super().check(config, cfg)
        if config.unit == "sequence":
            raise GranaryError(
                f"parallel=fsdp cuts matrices by rows of latents, and a {config.kind}'s heads serve many: use "
                "parallel=latent or ddp"
            )
        if not config.writes_rows:
            raise GranaryError(
                f"parallel=fsdp cuts matrices by rows, and the rows of a {config.kind}'s transform belong together: "
                "use parallel=latent or ddp"
            )

    def own_part(self, config: DictionaryConfig, learning: LearningConfig, **how: Unpack[Making]) -> Objective:
        """The latents whose rows the rank will hold."""
        return part_of(config, learning, self.mesh.get_group("dp"), **how)

    def num_latents(self, config: DictionaryConfig) -> int:
        """All: they are gathered for a step. Raises GranaryError when their rows do not divide among the ranks."""
        latents_of_shard(config.d_latent, self.world.size)
        return config.d_latent

    def distribute(self, objective: Objective, *, has_values: bool = True) -> Objective:
        """Every parameter cut by rows; out of a whole, no other rank than the first has more at any time."""
        made = objective.dictionary
        with torch.device("meta"):
            held = type(made)(made.config, kernels=made.kernels, compute_dtype=made.compute_dtype)
            sharded = Objective(held, objective.learning)
        fully_shard(sharded, mesh=self.mesh)
        give_memory(sharded, self.world.device)
        if has_values:
            self._fill(held, made, own_rows=isinstance(objective.shard, GroupShard))
        register_fsdp_forward_method(sharded, "facts")
        assert isinstance(sharded, FSDPModule)
        # Losses are weighted by their share of the batch, so gradients add up; as a plain sum, which gloo knows too.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        self._local = LocalRows(sharded)
        return sharded

    def _fill(self, held: Dictionary, made: Dictionary, *, own_rows: bool) -> None:
        """Hand every rank its rows of rank 0's `made`, which is empty afterwards; latents' `own_rows` are here."""
        roles = made.roles()
        for name, tensor in held.state_dict().items():
            given, sharded = take(made, name), isinstance(tensor, DTensor)
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if own_rows and roles[name].latent_axis is not None:
                part.copy_(given)
                continue
            if sharded and given.shape[0] % self.world.size == 0:
                scatter_rows(given, part, self.world.size)
                continue
            values = given if self.world.is_main else torch.empty_like(given, device=part.device)
            dist.broadcast(values, src=0)
            part.copy_(distribute_tensor(values, self.mesh, [Shard(0)]).to_local() if sharded else values)

    def optimiser(self, objective: Objective, config: OptimiserConfig) -> Optimiser:
        """Build that of the rank's own rows."""
        assert self._local is not None
        return make_optimiser(self._local, config, rows=RowShare(self.world.size, all_reduce_sum))

    def zero_gradients(self, optimiser: Optimiser) -> None:
        """Clear the gradients of the sharded parameters and of their local views."""
        assert self._local is not None
        optimiser.zero_grad()
        for parameter in self._local.sharded.values():
            parameter.grad = None

    def losses(self, objective: Objective, x: Given, y_ND: Tensor, inputs: StepInputs) -> Losses:
        """Gradients leave the rank once per step, with the last micro-batch."""
        assert isinstance(objective, FSDPModule)
        objective.set_requires_gradient_sync(inputs.last)
        return super().losses(objective, x, y_ND, inputs)

    def reduce_gradients(self, optimiser: Optimiser) -> Tensor:
        """They are reduced already: hand the local rows to the optimiser."""
        assert self._local is not None
        for name, parameter in self._local.sharded.items():
            assert isinstance(parameter.grad, DTensor)
            self._local.rows[name].grad = parameter.grad.to_local()
        found = [rows.grad for rows in self._local.rows.values() if rows.grad is not None]
        return joint_norm(found, [])

    def as_global(self, objective: Objective, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moments and averages get the sharding of their parameters."""
        assert self._local is not None
        seen = {}
        for name, tensor in tensors.items():
            # optim.first.activation.r_mag, ema.activation.r_mag
            prefix = {"optim": 2, "ema": 1}.get(name.partition(".")[0])
            parameter = self._local.sharded.get(".".join(name.split(".")[prefix:])) if prefix else None
            if parameter is not None:
                whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
                if tensor.shape != parameter.to_local().shape:  # scales of blocks, equally many on every rank
                    whole = {}
                tensor = DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False, **whole)
            seen[name] = tensor
        return seen
