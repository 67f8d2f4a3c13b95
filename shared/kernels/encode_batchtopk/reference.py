"""The dense truth of ``encode_batchtopk``: the whole [N, F] product and one stable sort of all of it."""

import torch

from shared.kernels.ragged import pad_dense


def encode_batchtopk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_batchtopk.encode_batchtopk``."""
    z_NF = x_ND @ W_FD.T + b_F
    # Flattened by rows: a stable sort puts the lower row, then the lower latent, first.
    order = torch.sort(z_NF.flatten(), descending=True, stable=True).indices[: x_ND.shape[0] * k]
    kept_NF = torch.zeros_like(z_NF, dtype=torch.bool)
    kept_NF.view(-1)[order] = True
    return pad_dense(z_NF, kept_NF & ~(z_NF <= 0))
