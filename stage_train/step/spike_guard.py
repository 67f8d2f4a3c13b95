"""The guard against bad batches: a step whose loss or gradient is out of the ordinary is left out, on all ranks."""

import math
from collections import deque

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.parallel import all_reduce_max

# Accepted losses that a new one is compared with; before there are so many, only what is not finite is refused.
WINDOW = 32
# Steps in a row that may be refused.
PATIENCE = 32


class SpikeGuard:
    """Refuses a step whose loss is above `factor` times the mean of the last accepted ones, or not finite.

    Looking at a loss waits for the device, once per step.
    """

    def __init__(self, factor: float) -> None:
        """Raises GranaryError unless `factor` is above 1."""
        if not factor > 1:
            raise GranaryError(f"optim.spike_factor={factor}: must be above 1, or null for no guard")
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.refused = 0
        """In all."""
        self._in_a_row = 0

    def admits(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether to take the step: the same answer on all ranks, one of which may see what others do not.

        `loss` is the global batch's. Raises GranaryError when too many in a row were refused.
        """
        value = float(loss)
        bad = not (math.isfinite(value) and math.isfinite(float(grad_norm)))
        if len(self.losses) == WINDOW:
            bad = bad or value > self.factor * sum(self.losses) / WINDOW
        bad = bool(all_reduce_max(torch.tensor(int(bad), device=loss.device)))
        if not bad:
            self.losses.append(value)
            self._in_a_row = 0
            return True
        self.refused += 1
        self._in_a_row += 1
        if self._in_a_row == PATIENCE:
            raise GranaryError(
                f"training diverged: {PATIENCE} steps in a row were left out (last loss {value:.4g}, gradient norm "
                f"{float(grad_norm):.4g}): lower optim.lr, or raise optim.spike_factor; the last checkpoint is intact"
            )
        return False

    def state(self) -> dict[str, object]:
        """Return what ``restore`` takes, as JSON."""
        return {"losses": list(self.losses), "refused": self.refused}

    def restore(self, state: dict[str, object]) -> None:
        """The inverse of ``state``."""
        losses, refused = state["losses"], state["refused"]
        assert isinstance(losses, list)
        assert isinstance(refused, int)
        self.losses, self.refused = deque(losses, maxlen=WINDOW), refused
