"""Where the rows of each transform lie among those of all."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise

import torch


class Ranks:
    """The rank of every transform that is held, in order."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.offsets = (0, *accumulate(ranks))
        """F + 1 numbers: transform i has rows ``offsets[i] : offsets[i + 1]``."""
        self._on: dict[torch.device, torch.Tensor] = {}

    @property
    def total(self) -> int:
        """Rows of all transforms, R."""
        return self.offsets[-1]

    @property
    def largest(self) -> int:
        """The highest rank."""
        return max(self.each, default=0)

    @property
    def each(self) -> tuple[int, ...]:
        """The rank of each transform."""
        return tuple(last - first for first, last in pairwise(self.offsets))

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and last row of each transform, the last excluded."""
        return pairwise(self.offsets)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Neighbours of one rank, whose rows are a batch of equal matrices: the rank, and all their rows."""
        first = 0
        for rank, same in groupby(self.each):
            last = first + rank * sum(1 for _ in same)
            yield rank, slice(first, last)
            first = last

    def on(self, device: torch.device) -> torch.Tensor:
        """`offsets`, int64 on a device; made once for each."""
        if device not in self._on:
            self._on[device] = torch.tensor(self.offsets, device=device)
        return self._on[device]

    def spread(self, per_transform: torch.Tensor) -> torch.Tensor:
        """One entry per transform, [..., F], as one per row, [..., R]."""
        counts = self.on(per_transform.device).diff()
        return per_transform.repeat_interleave(counts, dim=-1, output_size=self.total)
