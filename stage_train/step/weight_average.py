"""The moving average of the weights over steps, which may be exported in place of the last ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.basics.errors import GranaryError


class WeightAverage:
    """``average <- decay * average + (1 - decay) * weight`` after every step, of this rank's part of the weights.

    The first steps use less: ``min(decay, (1 + step) / (10 + step))``, so that the random start is soon forgotten.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """`weights` are followed; they are the averages' start. Raises GranaryError for a decay that is none."""
        if not 0 < decay < 1:
            raise GranaryError(f"optim.ema_decay={decay}: must lie between 0 and 1, or be null")
        self.decay = decay
        self.weights = dict(weights)
        self.tensors = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimiser step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.tensors.items():
            average.lerp_(self.weights[name].detach(), 1 - decay)
