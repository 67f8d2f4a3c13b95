"""The dense truth of ``encode_topk``: the whole [N, F] product, then a stable sort."""

import torch


def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``."""
    z_NF = torch.relu(x_ND @ W_FD.T + b_F)
    values_NF, indices_NF = torch.sort(z_NF, dim=1, descending=True, stable=True)  # stable: lowest index wins a tie
    values_NK, indices_NK = values_NF[:, :k], indices_NF[:, :k]
    return values_NK, indices_NK.masked_fill(values_NK == 0, -1)
