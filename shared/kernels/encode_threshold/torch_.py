"""``encode_threshold`` in blocks of rows: one [rows, F] tile at a time, the pairs that pass kept.

Where a bfloat16 product is faster, it leaves out what can't pass, and float32 decides on the rest.
"""

import torch

from shared.kernels.encode_topk.bounds import pairs_from
from shared.kernels.ragged import pad_tiles


@torch.no_grad()
def encode_threshold(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, threshold_F: torch.Tensor, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_threshold.encode_threshold``."""
    empty = torch.empty(0, dtype=torch.int64, device=x_ND.device)
    parts = [(empty, empty, x_ND[:0, 0])]
    for rows_P, latents_P, values_P in pairs_from(x_ND, W_FD, b_F, compute_dtype, lambda: threshold_F):
        kept_P = ~(values_P <= threshold_F[latents_P])
        parts.append((rows_P[kept_P], latents_P[kept_P], values_P[kept_P]))
    rows_P, latents_P, values_P = (torch.cat(part) for part in zip(*parts, strict=True))
    return pad_tiles(rows_P, latents_P, values_P, x_ND.shape[0])
