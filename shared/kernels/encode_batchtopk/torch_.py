"""``encode_batchtopk`` in blocks of rows: one [rows, F] tile at a time, the best N * k pairs so far kept."""

import torch

from shared.kernels.encode_batchtopk.pool import Pool
from shared.kernels.encode_topk.bounds import pairs_from
from shared.kernels.ragged import pad_rows


@torch.no_grad()
def encode_batchtopk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_batchtopk.encode_batchtopk``."""
    pool = Pool(x_ND.shape[0] * k, W_FD.shape[0], x_ND)
    for rows_P, latents_P, values_P in pairs_from(x_ND, W_FD, b_F, compute_dtype, lambda: pool.bar):
        positive_P = ~(values_P <= 0)
        pool.add(rows_P[positive_P], latents_P[positive_P], values_P[positive_P])
    return pad_rows(*pool.pairs(), x_ND.shape[0])
