"""One step of Adam as the passes over a matrix take it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AdamStep:
    """``g = clip * grad``, then with `unit_rows` its component along each row is removed; Adam (Kingma and Ba 2015);
    with `unit_rows` each row is divided by its norm."""

    lr: float
    betas: tuple[float, float]
    """Decay rates of the first and the second moment."""
    eps: float
    step: int
    """Number of this step, from 1, for the bias correction."""
    clip: torch.Tensor
    """Factor of the gradient, a scalar tensor on its device: clipping costs no host synchronisation."""
    unit_rows: bool
    """Rows have unit norm, and keep it."""

    @property
    def corrections(self) -> tuple[float, float]:
        """What the moments are divided by: ``1 - beta ** step``."""
        return 1 - self.betas[0] ** self.step, 1 - self.betas[1] ** self.step

    @property
    def scalars(self) -> tuple[float, ...]:
        """Return what the kernels take; 1 - beta is made here, since in float32 1 - 0.999 is off by 1e-5 of itself."""
        (beta1, beta2), (correction1, correction2) = self.betas, self.corrections
        return self.lr, beta1, 1 - beta1, beta2, 1 - beta2, self.eps, correction1, correction2, self.step
