"""An equal share of a dictionary's latents, and the group of ranks that hold the others.

``latent`` trains on it, and ``fsdp`` begins with it: each rank draws, and sets from data, its own rows alone, and all
together have what one process with the whole would. Shape letters: N rows, D a width, F latents held here, R dead
latents held here, K picks per row, L ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shared.kernels import decode
from shared.sae.activations import Activation, BatchTopK, Encoder, Gated, JumpReLU, ReLU, TopK
from shared.sae.config import DictionaryConfig
from shared.sae.contexts import Given
from shared.sae.groups import LatentGroup
from shared.sae.latent_shard import LatentShard
from shared.sae.learn.config import LearningConfig
from shared.sae.learn.objective import Objective
from shared.sae.variants import VARIANTS
from shared.sae.variants.one_group import OneGroup

# Elements of all ranks' rows that are in one place at a time, in as many columns as fit: 64 MiB.
BLOCK_ELEMENTS = 1 << 24
# A block is so many columns or a multiple: vectors of any processor, so that it is summed as the whole is.
LEAST_COLUMNS = 64


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


def best_of_group(
    values_NK: Tensor, indices_NK: Tensor, group: dist.ProcessGroup, k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Values and local indices [N, k]: column j is the row's j-th largest of all ranks where held here, else 0 and -1.

    Every rank gives as many columns K, positive values and 0 for padding. Without `k` nothing is left out.
    """
    size, rank, own = dist.get_world_size(group), dist.get_rank(group), values_NK.shape[1]
    gathered = [torch.empty_like(values_NK) for _ in range(size)]
    dist.all_gather(gathered, values_NK, group=group)
    # Stable: among equal values the lower latent comes first, as in one process.
    candidates_NC, places_NC = torch.cat(gathered, dim=1).sort(dim=1, descending=True, stable=True)
    if k is None:
        k = max(1, int((candidates_NC > 0).sum(1).max()))
    best_NK, places_NK = candidates_NC[:, :k], places_NC[:, :k] - rank * own
    mine = (places_NK >= 0) & (places_NK < own)
    picked_NK = indices_NK.gather(1, places_NK.clamp(0, own - 1))
    return torch.where(mine, best_NK, 0.0), torch.where(mine, picked_NK, -1)


class GroupActivation(Activation):
    """An activation of any number of latents per row, whose ``encode`` gives the slots of all latents of the group."""

    group: dist.ProcessGroup

    def encode(self, encoder: Encoder, x: Given) -> tuple[Tensor, Tensor]:
        """What fires here in the slots that it has in the whole."""
        values_NK, indices_NK = super().encode(encoder, x)
        width = torch.tensor(values_NK.shape[1], device=values_NK.device)
        dist.all_reduce(width, dist.ReduceOp.MAX, group=self.group)
        more = (0, int(width) - values_NK.shape[1])
        return best_of_group(F.pad(values_NK, more), F.pad(indices_NK, more, value=-1), self.group)


class GroupTopK(TopK):
    """TopK over all latents of the group, of which this rank keeps its own."""

    group: dist.ProcessGroup

    def select(self, encoder: Encoder, x: Given, k: int) -> tuple[Tensor, Tensor]:
        """Select as ``best_of_group`` does."""
        own = min(k, encoder.num_latents)
        return best_of_group(*super().select(encoder, x, own), self.group, k)


class GroupBatchTopK(GroupActivation, BatchTopK):
    """BatchTopK over all latents of the group."""


class GroupReLU(GroupActivation, ReLU):
    """ReLU over all latents of the group."""


class GroupJumpReLU(GroupActivation, JumpReLU):
    """JumpReLU over all latents of the group."""


class GroupGated(GroupActivation, Gated):
    """Gated over all latents of the group."""


OVER_GROUP: dict[str, type[GroupTopK | GroupActivation]] = {
    "topk": GroupTopK,
    "batchtopk": GroupBatchTopK,
    "relu": GroupReLU,
    "jumprelu": GroupJumpReLU,
    "gated": GroupGated,
}


class GroupShard(LatentShard):
    """How the ranks of a group meet."""

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
        """Find it among all ranks' candidates; every rank sends as many, with -inf where it has fewer."""
        return self._largest(values_NR, k, -torch.inf)[:, -1:]

    def least_of_largest(self, values_NK: Tensor, indices_NK: Tensor, count: int) -> Tensor:
        """Padding is 0, and what is kept is not."""
        best_P = self._largest(values_NK.reshape(1, -1), count, 0.0)
        return best_P.masked_fill(best_P == 0, torch.inf).amin()

    def _largest(self, values_NR: Tensor, k: int, padding: float) -> Tensor:
        """The k largest of each row of all ranks, [N, k]; `padding` where there are fewer."""
        own = min(k, values_NR.shape[1])
        best_NK = values_NR.new_full((values_NR.shape[0], k), padding)
        best_NK[:, :own] = values_NR.topk(own, dim=1).values
        gathered = [torch.empty_like(best_NK) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, best_NK, group=self.group)
        return torch.cat(gathered, dim=1).topk(k, dim=1).values

    def written(self, group: LatentGroup, values_NK: Tensor, indices_NK: Tensor, read: Given) -> Tensor:
        """Write on the group's first rank, which gets everyone's rows a block of columns at a time.

        A row of the result is then the sum, in one order, that one process makes of it. Of latents that have no such
        rows it is everyone's sum.
        """
        if not group.writes_rows:
            y_ND = group.written(values_NK, indices_NK, read=read)
            dist.all_reduce(y_ND, group=self.group)
            return y_ND
        values_NK, indices_NK = values_NK.clone(), torch.where(indices_NK < 0, -1, indices_NK + self.first)
        dist.all_reduce(values_NK, group=self.group)  # each slot is one rank's, and 0 on the others
        dist.all_reduce(indices_NK, dist.ReduceOp.MAX, group=self.group)
        W_FD, size = group.W_dec, dist.get_world_size(self.group)
        first, is_first = dist.get_global_rank(self.group, 0), dist.get_rank(self.group) == 0
        rows, columns = W_FD.shape
        width = max(1, BLOCK_ELEMENTS // (size * rows * LEAST_COLUMNS)) * LEAST_COLUMNS
        y_ND = values_NK.new_empty(len(values_NK), columns)
        for start in range(0, columns, width):
            block = slice(start, min(start + width, columns))
            own_FB = W_FD[:, block].contiguous()
            whole_GB = own_FB.new_empty(size * rows, own_FB.shape[1]) if is_first else None
            dist.gather(own_FB, None if whole_GB is None else list(whole_GB.chunk(size)), first, self.group)
            if whole_GB is not None:
                y_ND[:, block] = decode(values_NK, indices_NK, whole_GB, kernels=group.kernels)
        dist.broadcast(y_ND, first, self.group)
        return y_ND


def part_of(
    config: DictionaryConfig,
    learning: LearningConfig,
    group: dist.ProcessGroup,
    *,
    kernels: str,
    compute_dtype: str,
    generator: torch.Generator | None = None,
) -> Objective:
    """This rank's share of the latents of a dictionary of one group, which divide among the ranks of the process group.

    Its first weights are its rows of those that the whole has with the same `generator`.
    """
    rows, rank = config.d_latent // dist.get_world_size(group), dist.get_rank(group)
    held = VARIANTS[config.kind](
        config,
        kernels=kernels,
        compute_dtype=compute_dtype,
        generator=generator,
        held=range(rank * rows, (rank + 1) * rows),
    )
    assert isinstance(held, OneGroup)
    activation = OVER_GROUP[config.activation](config, rows)
    activation.group = group
    held.activation = activation
    objective = Objective(held, learning)
    objective.shard = GroupShard(rank * rows, group)
    return objective
