"""The dense truth of ``encode_threshold``: the whole [N, F] product and a comparison."""

import torch

from shared.kernels.ragged import pad_dense


def encode_threshold(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, threshold_F: torch.Tensor, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_threshold.encode_threshold``."""
    z_NF = x_ND @ W_FD.T + b_F
    return pad_dense(z_NF, ~(z_NF <= threshold_F))  # a NaN is kept: it must not be hidden
