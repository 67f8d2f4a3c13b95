"""Encoder forward with exact top-k selection: the only part of a step that needs the dense N x F product."""

import torch

from shared.kernels.compute import AUTO, Compute
from shared.kernels.dispatch import implementation


def encode_topk(
    x_ND: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    k: int,
    *,
    compute: Compute = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of ``relu(x W^T + b)`` per row, and where they are. No gradient: see ``shared.kernels.autograd``.

    x_ND [N, D], W_FD [F, D], b_F [F] of one floating type; 1 <= k <= F.
    Returns values [N, k] in descending order and indices int64 [N, k]. Equal values are taken in index order. A slot
    that ReLU zeroed has value 0 and index -1: an index >= 0 means the latent fired.
    The torch and triton forms never hold an [N, F] tensor.

    compute.dtype bfloat16 runs the matrix product in bfloat16. triton: operands are rounded, sums and selection stay in
    float32. torch: the product only nominates k + k / 4 candidates, whose values are then computed in float32 before
    the k largest are taken. reference: ignored.
    float32 too uses such a product on a processor where it is fast, but only to leave out what provably is not among
    the k largest (``bounds``): the picks are float32's.
    """
    if not 1 <= k <= W_FD.shape[0]:
        raise ValueError(f"k={k} is not between 1 and the number of latents, {W_FD.shape[0]}")
    return implementation("encode_topk", compute.kernels, x_ND).encode_topk(x_ND, W_FD, b_F, k, compute.dtype_for(x_ND))
