"""The (row, latent) pairs of a batch, sorted by latent: what both weight gradients walk over.

Shapes: N rows, K picks per row, P = number of valid pairs, F latents.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs in latent order; within a latent in row order, so that every sum has one fixed order."""

    order_P: torch.Tensor
    """int64 [N * K]: position of each pair in the flattened [N, K] picks; padding comes first. Its row is
    ``order_P // K``."""
    offsets_F: torch.Tensor
    """int64 [F + 1]: pairs of latent f are ``offsets_F[f] : offsets_F[f + 1]`` of order_P."""


def sort_pairs(indices_NK: torch.Tensor, num_latents: int) -> SortedPairs:
    """Sort the picks by latent, stably. No host synchronisation."""
    # int32 halves what the sort moves; the number of latents is far below 2^31.
    latents, order = torch.sort(indices_NK.reshape(-1).to(torch.int32), stable=True)
    boundaries = torch.arange(num_latents + 1, device=latents.device, dtype=torch.int32)
    return SortedPairs(order, torch.searchsorted(latents, boundaries))


class PairOrder:
    """The sorted form of one batch's picks, made on first use and shared by every gradient that needs it."""

    def __init__(self, indices_NK: torch.Tensor, num_latents: int) -> None:
        self._indices_NK = indices_NK
        self._num_latents = num_latents
        self._sorted: SortedPairs | None = None

    def get(self) -> SortedPairs:
        """The sorted pairs; the first call sorts."""
        if self._sorted is None:
            self._sorted = sort_pairs(self._indices_NK, self._num_latents)
        return self._sorted
