"""The dense truth of ``auxk_error``: plain autograd over [N, R]."""

import torch


def auxk_error(
    residual_ND: torch.Tensor,
    centred_ND: torch.Tensor,
    W_enc_RD: torch.Tensor,
    b_enc_R: torch.Tensor,
    W_dec_RD: torch.Tensor,
    num_aux: int,
) -> torch.Tensor:
    """See ``shared.kernels.auxk.auxk_error``."""
    z_NR = torch.relu(torch.addmm(b_enc_R, centred_ND, W_enc_RD.T))
    if W_enc_RD.shape[0] > num_aux:
        kth_N1 = z_NR.detach().topk(num_aux, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        z_NR = z_NR * (z_NR.detach() >= kth_N1)
    error_N = (residual_ND - z_NR @ W_dec_RD).square().sum(1)
    energy_N = residual_ND.square().sum(1).clamp_min(torch.finfo(residual_ND.dtype).tiny)
    return (error_N / energy_N).mean()
