"""Sums of metrics between two logging steps, on the device, so that a step never waits for a number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.parallel import all_reduce_sum


class MetricSums:
    """Token-weighted means of per-batch metrics over the steps since the last ``read``, over all ranks.

    Every step may bring other metrics (a loss that is not always on); those absent count as 0.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        """This rank's sum over tokens of each metric, then the number of tokens."""
        self.saved = torch.zeros_like(self.sums)
        """All ranks' sums as of the last ``collect``: part of the training state."""
        self._mark = torch.zeros_like(self.sums)

    def add(self, metrics: Mapping[str, Tensor], num_tokens: int) -> None:
        """Count a batch (or micro-batch) of this rank, whose `metrics` are means over its `num_tokens` rows."""
        zero = self.sums.new_zeros(())
        values = [metrics[name].double() if name in metrics else zero for name in self.names]
        self.sums += num_tokens * torch.stack([*values, zero + 1])

    def mark(self) -> None:
        """Remember the sums, for ``since_mark`` and ``back_to_mark``."""
        self._mark.copy_(self.sums)

    def since_mark(self, name: str) -> Tensor:
        """What one metric's sum has grown by, a scalar."""
        return (self.sums - self._mark)[self.names.index(name)]

    def back_to_mark(self) -> None:
        """Forget what was added since."""
        self.sums.copy_(self._mark)

    def collect(self, copies: int) -> Tensor:
        """``saved``, filled with the sums over each row once, where `copies` ranks add each. All ranks call it."""
        self.saved.copy_(self.sums)
        return all_reduce_sum(self.saved).div_(copies)

    def restore(self, *, first: bool) -> None:
        """Go on from ``saved``, which only the ranks of the first share of the rows (`first`) keep."""
        self.sums.copy_(self.saved if first else torch.zeros_like(self.saved))

    def read(self) -> dict[str, float]:
        """The means, and begin a new window. Waits for the device and the other ranks."""
        *sums, tokens = all_reduce_sum(self.sums.clone()).tolist()
        self.sums.zero_()
        return {name: value / max(tokens, 1) for name, value in zip(self.names, sums, strict=True)}
