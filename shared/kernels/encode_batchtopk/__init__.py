"""Encoder forward with the N * k largest pre-activations of a whole batch: BatchTopK's training step."""

import torch

from shared.kernels.compute import AUTO, Compute
from shared.kernels.dispatch import implementation


def encode_batchtopk(
    x_ND: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    k: int,
    *,
    compute: Compute = AUTO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The N * k largest positive entries of ``z = x W^T + b``, k per row on average (Bussmann et al. 2024).

    No gradient: see ``shared.kernels.autograd``. x_ND [N, D], W_FD [F, D], b_F [F] of one floating type; 1 <= k <= F.
    Returns values [N, M] in descending order and indices int64 [N, M]; behind them value 0 and index -1. M is the
    batch's largest count, at least 1. Fewer than N * k pairs come back only when fewer are positive. Of equal values at
    the cut the lower row, then the lower latent, is kept; within a row equal values are in latent order.
    ``smallest_kept`` gives the batch's threshold. The torch and triton forms hold one tile of z at a time, and a pool
    of at most a few N * k pairs; both wait for the device.

    compute.dtype: as for ``encode_threshold``. Raises ValueError for a k out of range.
    """
    if not 1 <= k <= W_FD.shape[0]:
        raise ValueError(f"k={k} is not between 1 and the number of latents, {W_FD.shape[0]}")
    module = implementation("encode_batchtopk", compute.kernels, x_ND)
    pairs: tuple[torch.Tensor, torch.Tensor] = module.encode_batchtopk(x_ND, W_FD, b_F, k, compute.dtype_for(x_ND))
    return pairs


def smallest_kept(values_NM: torch.Tensor, indices_NM: torch.Tensor) -> torch.Tensor:
    """The smallest value that was kept, a scalar tensor; infinity where nothing was. No host synchronisation."""
    return values_NM.masked_fill(indices_NM < 0, torch.inf).amin()
