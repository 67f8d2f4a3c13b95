"""``encode_threshold`` in blocks of rows: one [rows, F] tile at a time, the pairs that pass kept."""

import torch

from shared.kernels.encode_topk.candidates import RowTiles, exact_values, margin
from shared.kernels.ragged import pad_ordered


def encode_threshold(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, threshold_F: torch.Tensor, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_threshold.encode_threshold``."""
    tiles = RowTiles(x_ND, W_FD, b_F, compute_dtype)
    parts = []
    slack_N1 = margin(x_ND, W_FD)[:, None] if tiles.nominates else None
    for rows, z_tile in tiles:
        bar = threshold_F if slack_N1 is None else threshold_F - slack_N1[rows]
        tile_rows, latents = (~(z_tile <= bar)).nonzero(as_tuple=True)
        values = z_tile[tile_rows, latents]
        tile_rows = tile_rows + rows.start
        if tiles.nominates:
            values = exact_values(x_ND, W_FD, b_F, tile_rows, latents)
            kept = ~(values <= threshold_F[latents])
            tile_rows, latents, values = tile_rows[kept], latents[kept], values[kept]
        parts.append((tile_rows, latents, values))
    empty = torch.empty(0, dtype=torch.int64, device=x_ND.device)
    rows_P, latents_P, values_P = (torch.cat(part) for part in zip((empty, empty, x_ND[:0, 0]), *parts, strict=True))
    return pad_ordered(rows_P, latents_P, values_P, x_ND.shape[0])
