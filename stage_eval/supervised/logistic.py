"""Logistic regression by Newton's method, in float64: one optimum, whatever the machine, and no step size to choose.

N tokens, D features. Both classes weigh the same together, however many tokens each has. Features are centred and
scaled to unit variance before a ridge of `RIDGE` is put on their weights (scikit-learn's C = 1), so that latents and
coordinates of any scale are treated alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1.0
STEPS = 50
ENOUGH = 1e-8  # of the Newton decrement, which bounds how far the loss is from its minimum


@dataclass(frozen=True)
class Probe:
    """A linear classifier: it says yes where the logit is above 0."""

    weight_D: Tensor
    bias: float

    def logits(self, x_ND: Tensor) -> Tensor:
        """Log odds of yes, float64 [N]."""
        return x_ND.double() @ self.weight_D + self.bias


def fit(x_ND: Tensor, is_yes_N: Tensor) -> Probe:
    """The probe of least loss; both classes must be there."""
    x_ND = x_ND.double()
    yes, count = int(is_yes_N.sum()), len(is_yes_N)
    weight_N = torch.where(is_yes_N, count / (2 * yes), count / (2 * (count - yes))).double()
    mean_D = x_ND.mean(0)
    scale_D = x_ND.std(0, correction=0)
    scale_D = torch.where(scale_D > 0, scale_D, 1.0)
    x_N1D = torch.cat([(x_ND - mean_D) / scale_D, x_ND.new_ones(count, 1)], dim=1)
    ridge = torch.full((x_N1D.shape[1],), RIDGE, dtype=torch.float64, device=x_ND.device)
    ridge[-1] = 0  # the bias is free
    target_N = is_yes_N.double()
    beta = torch.zeros_like(ridge)

    def loss(beta: Tensor) -> float:
        logits_N = x_N1D @ beta
        cross_entropy_N = torch.nn.functional.softplus(logits_N) - target_N * logits_N
        return float(weight_N @ cross_entropy_N + (ridge * beta.square()).sum() / 2)

    now = loss(beta)
    for _ in range(STEPS):
        p_N = torch.sigmoid(x_N1D @ beta)
        gradient = x_N1D.T @ (weight_N * (p_N - target_N)) + ridge * beta
        curvature = x_N1D.T @ (x_N1D * (weight_N * p_N * (1 - p_N))[:, None]) + torch.diag(ridge)
        curvature[-1, -1] += 1e-10  # of a bias whose tokens are all certain
        step = torch.linalg.solve(curvature, gradient)
        if float(gradient @ step) < ENOUGH:
            break
        length = 1.0
        while (then := loss(beta - length * step)) > now and length > 1e-6:
            length /= 2
        beta, now = beta - length * step, then
    weight_D = beta[:-1] / scale_D
    return Probe(weight_D, float(beta[-1] - weight_D @ mean_D))
