"""The dense truth of ``auxk_error``: plain autograd over [N, R]."""

import torch

from shared.kernels.auxk.leaky import leaky
from shared.kernels.auxk.ranks import DeadRows, LatentRanks


def auxk_error(
    residual_ND: torch.Tensor,
    centred_ND: torch.Tensor,
    dead: DeadRows,
    num_aux: int,
    ranks: LatentRanks,
    slope: float,
) -> torch.Tensor:
    """See ``shared.kernels.auxk.auxk_error``."""
    z_NR = leaky(torch.addmm(dead.b_enc_R, centred_ND, dead.W_enc_RD.T), slope)
    if dead.count > num_aux:
        z_NR = z_NR * (z_NR.detach() >= ranks.kth_largest(z_NR.detach(), num_aux))
    error_N = (residual_ND - ranks.sum_forward(z_NR @ dead.W_dec_RD)).square().sum(1)
    energy_N = residual_ND.square().sum(1).clamp_min(torch.finfo(residual_ND.dtype).tiny)
    return (error_N / energy_N).mean()
