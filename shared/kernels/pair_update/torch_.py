"""``PairGradient`` on a CPU: the gradient exists a tile of rows at a time, while the tile is in cache.

It is summed twice, for the norm and for the update. That costs less than to write it to memory and read it twice, where
it would be cleared as well, since Linux maps what is so large anew at each step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.kernels.adam_step import AdamStep
from shared.kernels.pairs import PairOrder
from shared.kernels.row_update.torch_ import row_update, tile_rows


@dataclass(frozen=True, slots=True)
class PairWalk:
    """The pairs in latent order, and further rows of the gradient of some latents, in latent order too.

    P pairs, of which those of -1 picks come first and are in no bag.
    """

    coefficients_P: torch.Tensor
    tokens_P: torch.Tensor
    """int32: the row of each pair."""
    offsets_F: torch.Tensor
    """int32 [F + 1]: pairs of latent f are ``offsets_F[f] : offsets_F[f + 1]``."""
    rows_ND: torch.Tensor
    latents_R: torch.Tensor
    extra_RD: torch.Tensor

    def tiles(self, weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Latents, and the gradient of these rows of `weight`, in its type."""
        size = tile_rows(weight)
        starts = list(range(0, len(weight), size))
        edges = torch.tensor([*starts, len(weight)], device=weight.device)
        pairs = self.offsets_F[edges].tolist()
        extra = torch.searchsorted(self.latents_R, edges).tolist()
        for number, start in enumerate(starts):
            tile = slice(start, min(start + size, len(weight)))
            mine, more = slice(*pairs[number : number + 2]), slice(*extra[number : number + 2])
            grad = F.embedding_bag(
                self.tokens_P[mine],
                self.rows_ND,
                self.offsets_F[tile.start : tile.stop + 1] - pairs[number],
                per_sample_weights=self.coefficients_P[mine],
                mode="sum",
                include_last_offset=True,
            ).to(weight.dtype)
            if more.start < more.stop:
                grad.index_add_(0, self.latents_R[more] - start, self.extra_RD[more])
            yield tile, grad


def make_walk(
    coefficients_NK: torch.Tensor,
    order: PairOrder,
    rows_ND: torch.Tensor,
    latents_R: torch.Tensor | None,
    extra_RD: torch.Tensor | None,
) -> PairWalk:
    """Sorts what the norm and the update both walk over."""
    if latents_R is None or extra_RD is None:
        latents_R, extra_RD = order.get().order_P[:0], rows_ND[:0]
    latents_R, order_R = latents_R.sort()
    return PairWalk(
        order.sort(coefficients_NK), order.rows(), order.get().offsets_F.int(), rows_ND, latents_R, extra_RD[order_R]
    )


def squared_norm(weight: torch.Tensor, walk: PairWalk) -> torch.Tensor:
    """See ``PairGradient.squared_norm``. In the type of `weight`."""
    return torch.stack([torch.linalg.vector_norm(grad) for _, grad in walk.tiles(weight)]).norm().square()


def pair_update(
    weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, adam: AdamStep, walk: PairWalk
) -> None:
    """See ``PairGradient.update``."""
    for tile, grad in walk.tiles(weight):
        row_update(weight[tile], grad, first[tile], second[tile], adam)
