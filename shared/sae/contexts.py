"""Whole contexts of activations, for encoders that attend: what a position means depends on those before it.

Shape letters: C contexts, T positions, D a width, N positions that count.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Contexts:
    """Activations of whole contexts, the documents in them, and the positions that are learnt from or scored.

    A position that does not count (BOS, a masked token) is still there for others to attend to. ``len`` is N.
    """

    rows_CTD: Tensor
    documents_CT: Tensor
    """int64: the document of each position, numbered within its context; -1 for padding, which nothing attends to."""
    places_N: Tensor
    """int64, ascending: c * T + t of the positions that count."""

    @classmethod
    def of(cls, rows_CTD: Tensor, documents_CT: Tensor, counts_CT: Tensor) -> Self:
        """`counts_CT` bool, best on the CPU: a GPU would have to be waited for."""
        places_N = counts_CT.reshape(-1).nonzero().squeeze(1).to(rows_CTD.device, non_blocking=True)
        return cls(rows_CTD, documents_CT.to(rows_CTD.device), places_N)

    @classmethod
    def whole(cls, rows_CTD: Tensor) -> Self:
        """One document each, of which every position counts."""
        shape, device = rows_CTD.shape[:2], rows_CTD.device
        places_N = torch.arange(shape[0] * shape[1], device=device)
        return cls(rows_CTD, torch.zeros(shape, dtype=torch.int64, device=device), places_N)

    @classmethod
    def stand_in(cls, like: "Contexts") -> Self:
        """One position of zeros, where a process has none and must take part all the same."""
        return cls.whole(like.rows_CTD.new_zeros(1, 1, like.rows_CTD.shape[-1]))

    def to(self, device: torch.device) -> "Contexts":
        """The same contexts on `device`."""
        return Contexts(self.rows_CTD.to(device), self.documents_CT.to(device), self.places_N.to(device))

    def __len__(self) -> int:
        return len(self.places_N)

    def part(self, contexts: slice) -> "tuple[Contexts, slice]":
        """Some of the contexts, and which of the N positions are theirs. Waits for the device."""
        T = self.documents_CT.shape[1]
        bounds = torch.tensor([contexts.start * T, contexts.stop * T], device=self.places_N.device)
        first, last = torch.searchsorted(self.places_N, bounds).tolist()
        places_N = self.places_N[first:last] - contexts.start * T
        return Contexts(self.rows_CTD[contexts], self.documents_CT[contexts], places_N), slice(first, last)

    def with_rows(self, rows_CTD: Tensor) -> "Contexts":
        """The same contexts with other activations."""
        return replace(self, rows_CTD=rows_CTD)

    def counted(self, rows_CTD: Tensor) -> Tensor:
        """Return the rows [N, D] of the positions that count, out of those of all."""
        return rows_CTD.flatten(0, 1).index_select(0, self.places_N)

    def spread(self, rows_ND: Tensor) -> Tensor:
        """[C, T, D] with such rows in their places, and zeros elsewhere."""
        C, T = self.documents_CT.shape
        all_SD = rows_ND.new_zeros(C * T, *rows_ND.shape[1:])
        return all_SD.index_copy_(0, self.places_N, rows_ND).unflatten(0, (C, T))


def as_attended(segments_CT: Tensor, *, isolated: bool) -> Tensor:
    """Segments of contexts as their model ran them: one document each where those in it see each other."""
    return segments_CT if isolated else segments_CT.clamp_max(0)


Given = Tensor | Contexts
"""What an encoder is given: rows of tokens [N, D], or whole contexts. ``len`` is the number of tokens."""


def in_parts(rows: Given, size: int) -> list[tuple[Given, slice]]:
    """Pieces of `size` tokens, of whole contexts as many positions but one context at least; and which of them all."""
    if isinstance(rows, Tensor):
        cuts = [slice(start, start + size) for start in range(0, len(rows), size)]
        return [(rows[cut], cut) for cut in cuts]
    C, T = rows.documents_CT.shape
    contexts = max(1, size // T)
    return [rows.part(slice(start, min(start + contexts, C))) for start in range(0, C, contexts)]
