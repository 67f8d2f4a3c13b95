"""Sums of metrics between two logging steps, on the device, so that a step never waits for a number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.parallel import all_reduce_sum


class MetricWindow:
    """Token-weighted means of per-batch metrics over the steps since the last ``read``, over all ranks.

    Every step may bring other metrics (a loss that is not always on); those absent count as 0.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        """Sum over tokens of each metric, then the number of tokens; part of the training state."""

    def add(self, metrics: Mapping[str, Tensor], num_tokens: int) -> None:
        """Count a batch (or micro-batch) of this rank, whose `metrics` are means over its `num_tokens` rows."""
        zero = self.sums.new_zeros(())
        values = [metrics[name].double() if name in metrics else zero for name in self.names]
        self.sums += num_tokens * torch.stack([*values, zero + 1])

    def read(self) -> dict[str, float]:
        """The means, and begin a new window. Waits for the device and the other ranks."""
        *sums, tokens = all_reduce_sum(self.sums.clone()).tolist()
        self.sums.zero_()
        return {name: value / max(tokens, 1) for name, value in zip(self.names, sums, strict=True)}
