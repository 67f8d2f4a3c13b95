"""Encoder forward where every latent above a threshold fires: ReLU and JumpReLU, and BatchTopK at inference."""

import torch

from shared.kernels.compute import AUTO, Compute
from shared.kernels.dispatch import implementation


def encode_threshold(
    x_ND: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    compute: Compute = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs with ``z = x W^T + b > threshold``. No gradient: see ``shared.kernels.autograd``.

    x_ND [N, D], W_FD [F, D], b_F [F] of one floating type; `threshold` is a number or a tensor [F] (JumpReLU,
    Rajamanoharan et al. 2024). Returns values [N, M], z itself, in descending order, and indices int64 [N, M]; behind
    them value 0 and index -1. M is the batch's largest count, at least 1; it is read on the host. Equal values are in
    index order. The torch and triton forms hold one tile of z at a time, and the pairs that passed.

    compute.dtype bfloat16 runs the matrix product in bfloat16. triton: operands are rounded, sums and comparison stay
    in float32. torch: that product only leaves out what provably does not pass, as for ``encode_topk``. reference:
    ignored.
    Raises ValueError for a threshold of another shape.
    """
    if isinstance(threshold, torch.Tensor) and threshold.shape not in (b_F.shape, ()):
        raise ValueError(
            f"threshold has shape {tuple(threshold.shape)}: a number or one per latent, {tuple(b_F.shape)}"
        )
    if isinstance(threshold, torch.Tensor):
        threshold_F = threshold.detach().to(b_F).expand_as(b_F)
    else:
        threshold_F = torch.full_like(b_F, threshold)  # made on the device: nothing waits for a copy
    return implementation("encode_threshold", compute.kernels, x_ND).encode_threshold(
        x_ND, W_FD, b_F, threshold_F, compute.dtype_for(x_ND)
    )
