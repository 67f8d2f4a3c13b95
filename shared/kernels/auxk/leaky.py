"""The leaky ReLU between the two halves of AuxK: ReLU where its slope is 0."""

import torch


def leaky(z: torch.Tensor, slope: float) -> torch.Tensor:
    """z where it is positive, `slope` times z where it is negative; autograd's gradient at 0 is 0, as ReLU's."""
    return torch.relu(z) if slope == 0 else torch.relu(z) - slope * torch.relu(-z)


def leaky_(z: torch.Tensor, slope: float) -> torch.Tensor:
    """``leaky`` in place, without gradient."""
    return z.relu_() if slope == 0 else torch.nn.functional.leaky_relu_(z, slope)


def through_leaky_(grad: torch.Tensor, out: torch.Tensor, slope: float) -> torch.Tensor:
    """The gradient of z, in place of that of `out`: ``leaky(z)`` where it was picked, and 0 where it was not."""
    grad.masked_fill_(out == 0, 0)
    return grad if slope == 0 else grad.mul_(torch.where(out < 0, slope, 1.0).to(grad.dtype))
