"""The (row, latent) pairs of a batch, sorted by latent: what both weight gradients walk over.

Shapes: N rows, K picks per row, P = N * K pairs, F latents.
"""

import weakref
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
        self.indices_NK = indices_NK
        self.num_latents = num_latents
        self._sorted: SortedPairs | None = None
        self._rows_P: torch.Tensor | None = None
        self._last: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None

    def get(self) -> SortedPairs:
        """The sorted pairs; the first call sorts."""
        if self._sorted is None:
            self._sorted = sort_pairs(self.indices_NK, self.num_latents)
        return self._sorted

    def starts(self) -> list[int]:
        """F + 1 numbers on the host: pairs of latent f are ``starts[f] : starts[f + 1]``. Waits for the device."""
        starts: list[int] = self.get().offsets_F.tolist()
        return starts

    def rows(self) -> torch.Tensor:
        """int32 [P]: the row of each sorted pair. Kernels read it in place of a 64-bit division per pair and thread."""
        if self._rows_P is None:
            self._rows_P = (self.get().order_P // self.indices_NK.shape[1]).to(torch.int32)
        return self._rows_P

    def sort(self, coefficients_NK: torch.Tensor) -> torch.Tensor:
        """[P]: coefficients in the order of the pairs, without history; the result for the last argument is kept."""
        # Autograd's nodes hold this object. Were it to hold a tensor with a history in turn, neither could ever be
        # freed: the way back leads through C++, where Python's collector sees nothing.
        if self._last is None or self._last[0]() is not coefficients_NK:
            sorted_P = coefficients_NK.detach().reshape(-1)[self.get().order_P]
            self._last = weakref.ref(coefficients_NK), sorted_P
        return self._last[1]

    def unsort(self, values_P: torch.Tensor) -> torch.Tensor:
        """[N, K]: values of the sorted pairs, each in the place of its pick."""
        values_NK = torch.empty(self.indices_NK.shape, dtype=values_P.dtype, device=values_P.device)
        values_NK.view(-1)[self.get().order_P] = values_P
        return values_NK
