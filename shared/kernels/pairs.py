"""The (row, latent) pairs of a batch, sorted by latent: what both weight gradients walk over.

Shapes: N rows, K picks per row, P = number of valid pairs, F latents.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs in latent order; within a latent in row order, so that every sum has one fixed order."""

    order_P: torch.Tensor
    """int64: position of each pair in the flattened [N, K] picks."""
    rows_P: torch.Tensor
    """int64: the row each pair came from."""
    offsets_F: torch.Tensor
    """int64 [F + 1]: pairs of latent f are ``offsets_F[f] : offsets_F[f + 1]``."""


def sort_pairs(indices_NK: torch.Tensor, num_latents: int) -> SortedPairs:
    """Sort the picks by latent, stably; -1 picks are left out."""
    num_picks = indices_NK.shape[1]
    flat = indices_NK.reshape(-1)
    latents, order = torch.sort(flat, stable=True)
    boundaries = torch.arange(num_latents + 1, device=flat.device)
    offsets = torch.searchsorted(latents, boundaries)
    padding = int(offsets[0])  # -1 sorts first
    order = order[padding:]
    return SortedPairs(order, order // num_picks, offsets - padding)


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
