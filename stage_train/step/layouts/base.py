"""What all layouts have, as it is where every rank holds the whole dictionary and reads its share of each batch.

Shape letters: N rows of this rank's batch, D a width, F latents (those held here), R dead latents.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.parallel import World, all_reduce_sum
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.learn.batch_facts import Reduce, alone
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.dead import in_turn, most_dead
from shared.sae.learn.inputs import BatchFacts, Losses, StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import Optimiser, OptimiserConfig, make_optimiser
from shared.sae.sites import Sites
from shared.sae.variants import VARIANTS
from stage_train.config import TrainSchema

T = TypeVar("T")

# Tensors up to this size share one message.
SMALL_ELEMENTS = 1 << 18


class Making(TypedDict):
    """What a dictionary is made with, beside its config."""

    kernels: str
    compute_dtype: str
    generator: torch.Generator


class Layout:
    """How a dictionary in training is spread over processes; a subclass says what is other than in data parallel."""

    def __init__(self, world: World) -> None:
        self.world = world

    # Which part of the data and of the weights

    @property
    def stream_rank(self) -> int:
        """Which share of the lanes this rank reads."""
        return self.world.rank

    @property
    def stream_world(self) -> int:
        """The number of shares into which the lanes are cut."""
        return self.world.size

    def begins_in_parts(self, config: DictionaryConfig) -> bool:
        """Whether each rank makes its own part of the first weights; else the first makes all and hands them out."""
        return False

    def sites(self, sites: Sites) -> Sites:
        """Which of a dictionary's sites the rank reads and must produce."""
        return sites

    def check(self, config: DictionaryConfig, cfg: TrainSchema) -> None:
        """Raise GranaryError for a dictionary that can't be spread in this way, or not as `cfg` trains it."""
        self.num_latents(config)

    def num_latents(self, config: DictionaryConfig) -> int:
        """How many latents of a dictionary are held here."""
        return config.d_latent

    def objective(
        self, config: DictionaryConfig, learning: LearningConfig, *, in_parts: bool, **how: Unpack[Making]
    ) -> Objective:
        """A dictionary to begin with, and how it is learnt, for ``distribute``: the whole, or `in_parts` the rank's."""
        if in_parts:
            return self.own_part(config, learning, **how)
        return Objective(VARIANTS[config.kind](config, **how), learning)

    def own_part(self, config: DictionaryConfig, learning: LearningConfig, **how: Unpack[Making]) -> Objective:
        """The rank's part, of a dictionary that ``begins_in_parts``."""
        raise NotImplementedError

    def distribute(self, objective: Objective, *, has_values: bool = True) -> Objective:
        """The rank's part of a whole dictionary, on the rank's device.

        Where the whole is given, rank 0's has values and the others' are on the meta device; without `has_values` all
        are, and the result is unset.
        """
        give_memory(objective, self.world.device)
        if has_values and self.world.size > 1:
            for tensor in objective.dictionary.state_dict().values():
                dist.broadcast(tensor, src=0)
        return objective

    def optimiser(self, objective: Objective, config: OptimiserConfig) -> Optimiser:
        """The optimiser of what is held here."""
        single = self.world.size == 1  # then nobody else has to see the gradients
        optimiser = make_optimiser(objective.dictionary, config, pair_gradients=single)
        objective.pair_gradients = optimiser.pairs if single else None
        return optimiser

    # One step

    def zero_gradients(self, optimiser: Optimiser) -> None:
        """Clear what is left of the step before; called before the first backward of a step."""
        optimiser.zero_grad()

    def facts(
        self, objective: Objective, parts: Sequence[Given], num_tokens: int, k: int | None
    ) -> list[BatchFacts] | None:
        """What the losses of this rank's micro-batches must know of the global batch; None when it is nothing."""
        if not objective.needs_facts(cut=len(parts) > 1 or self.stream_world > 1):
            return None
        reduce: Reduce = all_reduce_sum if self.world.size > 1 else alone
        return objective.facts(parts, num_tokens, k=k, reduce_all=reduce, reduce_rows=reduce)

    def losses(self, objective: Objective, x: Given, y_ND: Tensor, inputs: StepInputs) -> Losses:
        """Compute the losses of some of this rank's rows."""
        losses: Losses = objective(x, y_ND, inputs)
        return losses

    def reduce_gradients(self, optimiser: Optimiser) -> Tensor:
        """Sum every gradient over the ranks that share it, once; returns the norm of the whole gradient."""
        if self.world.size > 1:
            sum_over(gradients(optimiser))
        return optimiser.grad_norm()

    # Dead latents

    def merge_dead(self, tokens_since_fired_F: Tensor) -> None:
        """Each rank counts since it saw a latent fire itself; the least of the counts is the global one."""
        if self.world.size > 1:
            dist.all_reduce(tokens_since_fired_F, dist.ReduceOp.MIN)

    def look_at_dead(self, objective: Objective, dead_now_F: Tensor, turn: int) -> Tensor:
        """Indices of the dead latents held here that AuxK has in look number `turn`. Waits for the device."""
        return in_turn(dead_now_F.nonzero().squeeze(1), most_dead(objective.dictionary.config.widths), turn)

    def mean_over_latents(self, held: Tensor) -> float:
        """The mean of a number for each latent held here, over all latents."""
        return float(held.mean())

    def means_of_groups(self, objective: Objective, held: Tensor) -> list[float]:
        """The same for each group of latents."""
        means: list[float] = held.view(objective.dictionary.config.num_groups, -1).mean(1).tolist()
        return means

    # Checkpoints

    def as_global(self, objective: Objective, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the training state as torch.distributed.checkpoint must see them, sharing their memory."""
        return dict(tensors)


def of_owner(name: str, known: Mapping[str, T]) -> T | None:
    """What is `known` of the parameter or buffer that a tensor belongs to, by its name; None: nothing.

    Names of the training state, such as ``optim.first.W_enc``, end in the name that the dictionary has for it.
    """
    words = name.split(".")
    ends = (".".join(words[start:]) for start in range(len(words)))
    return next((known[end] for end in ends if end in known), None)


def give_memory(objective: Objective, device: torch.device) -> None:
    """Memory for what is on the meta device, which leaves it unset; all else stays as it is."""
    unset = {
        name: torch.empty_like(tensor, device=device)
        for name, tensor in objective.dictionary.state_dict().items()
        if tensor.device.type == "meta"
    }
    objective.dictionary.load_state_dict(unset, assign=True, strict=False)


def take(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer out of the module, so that its memory is free as soon as the caller is done with it."""
    owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    tensor = (owner._parameters if leaf in owner._parameters else owner._buffers).pop(leaf)
    assert tensor is not None
    return tensor.detach()


def scatter_rows(whole: Tensor, part: Tensor, parts: int) -> None:
    """Fill `part` with the rank's share of the rows of rank 0's `whole`, cut into `parts` equal ones that go round.

    Every rank calls it; what another than rank 0 gives for `whole` is not read.
    """
    shares = None
    if dist.get_rank() == 0:
        cut = whole.detach().tensor_split(parts)
        shares = [cut[rank % parts] for rank in range(dist.get_world_size())]
    dist.scatter(part, shares, src=0)


def gradients(optimiser: Optimiser) -> list[Tensor]:
    """All gradients, zeros where there is none."""
    found = []
    for parameter in optimiser.parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """All-reduce in place: large tensors each by themselves, small ones as one message."""
    large = [tensor for tensor in tensors if tensor.numel() > SMALL_ELEMENTS]
    small = [tensor for tensor in tensors if tensor.numel() <= SMALL_ELEMENTS]
    pending = [dist.all_reduce(tensor, group=group, async_op=True) for tensor in large]
    if small:
        message = torch.cat([tensor.flatten() for tensor in small])
        dist.all_reduce(message, group=group)
        for tensor, part in zip(small, torch.split(message, [tensor.numel() for tensor in small]), strict=True):
            tensor.copy_(part.view_as(tensor))
    for work in pending:
        work.wait()


def joint_norm(parts: Sequence[Tensor], whole: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> Tensor:
    """Euclidean norm of `parts`, of which the group's ranks hold different ones, and of `whole`, which all hold."""
    square = torch.stack([_squared_norm(tensor) for tensor in parts]).sum()
    if group is None:
        all_reduce_sum(square)
    else:
        dist.all_reduce(square, group=group)
    for tensor in whole:
        square = square + _squared_norm(tensor)
    return square.sqrt()


def _squared_norm(tensor: Tensor) -> Tensor:
    """Without a tensor of the squares, as large as the gradient."""
    squared: Tensor = torch.linalg.vector_norm(tensor).square()
    return squared
