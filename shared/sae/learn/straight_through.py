"""JumpReLU and the step function with straight-through gradients for the thresholds.

Rajamanoharan et al. 2024 (2407.14435): the step's derivative, a Dirac delta, is replaced by a rectangle of width
`bandwidth` and unit area around the threshold theta = exp(log_threshold). Only z > 0 counts (as in
Language-Model-SAEs): a bandwidth wider than 2 theta would otherwise take latents that are far from firing for near.

Shapes: N rows, F latents.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def _near(z_NF: torch.Tensor, theta_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """bool [N, F]: where the rectangle is not zero."""
    return ((z_NF - theta_F).abs() < bandwidth / 2) & (z_NF > 0)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NF: torch.Tensor, log_threshold_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
        theta_F = log_threshold_F.exp()
        ctx.save_for_backward(z_NF, theta_F)
        ctx.bandwidth = bandwidth
        return z_NF * (z_NF > theta_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        z_NF, theta_F = ctx.saved_tensors
        near_F = (grad_NF * _near(z_NF, theta_F, ctx.bandwidth)).sum(0)
        # d theta / d log theta = theta
        return grad_NF * (z_NF > theta_F), -theta_F * theta_F / ctx.bandwidth * near_F, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NF: torch.Tensor, log_threshold_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
        theta_F = log_threshold_F.exp()
        ctx.save_for_backward(z_NF, theta_F)
        ctx.bandwidth = bandwidth
        return (z_NF > theta_F).to(z_NF.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        z_NF, theta_F = ctx.saved_tensors
        near_F = (grad_NF * _near(z_NF, theta_F, ctx.bandwidth)).sum(0)
        return None, -theta_F / ctx.bandwidth * near_F, None


def jump_relu(z_NF: torch.Tensor, log_threshold_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """``z where z > theta else 0``; theta's gradient is ``-theta / bandwidth`` times the rectangle."""
    result: torch.Tensor = _JumpReLU.apply(z_NF, log_threshold_F, bandwidth)
    return result


def step(z_NF: torch.Tensor, log_threshold_F: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """``1 where z > theta else 0``; theta's gradient is ``-1 / bandwidth`` times the rectangle, z gets none."""
    result: torch.Tensor = _Step.apply(z_NF, log_threshold_F, bandwidth)
    return result
