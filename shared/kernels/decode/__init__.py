"""Decoder forward and its gradient for the values: weighted sums of, and dot products with, K of F rows."""

import torch

from shared.kernels.dispatch import implementation


def decode(
    values_NK: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor, *, kernels: str = "auto"
) -> torch.Tensor:
    """``out[n] = sum_j values[n, j] * W[indices[n, j]]``, [N, D]. No gradient: see ``shared.kernels.autograd``.

    values [N, K] and W [F, D] of one floating type, indices int64 [N, K]; -1 is padding, duplicates add up.
    """
    return implementation("decode", kernels, W_FD).decode(values_NK, indices_NK, W_FD)


def dot_picks(
    grad_ND: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor, *, kernels: str = "auto"
) -> torch.Tensor:
    """``out[n, j] = grad[n] . W[indices[n, j]]``, [N, K]: the gradient of ``decode`` for its values; 0 at padding."""
    return implementation("decode", kernels, W_FD).dot_picks(grad_ND, indices_NK, W_FD)
