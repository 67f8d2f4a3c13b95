"""``encode_batchtopk`` in blocks of rows: one [rows, F] tile at a time, the best N * k pairs so far kept."""

import torch

from shared.kernels.encode_batchtopk.pool import Pool
from shared.kernels.encode_topk.candidates import RowTiles, exact_values, margin
from shared.kernels.ragged import pad_rows


def encode_batchtopk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_batchtopk.encode_batchtopk``."""
    tiles = RowTiles(x_ND, W_FD, b_F, compute_dtype)
    pool = Pool(x_ND.shape[0] * k, W_FD.shape[0], x_ND)
    slack_N1 = margin(x_ND, W_FD)[:, None] if tiles.nominates else None
    for rows, z_tile in tiles:
        if slack_N1 is None:
            passes = ~(z_tile < pool.bar) & ~(z_tile <= 0)
        else:
            passes = ~(z_tile < pool.bar - slack_N1[rows])
        tile_rows, latents = passes.nonzero(as_tuple=True)
        values = z_tile[tile_rows, latents]
        tile_rows = tile_rows + rows.start
        if tiles.nominates:
            values = exact_values(x_ND, W_FD, b_F, tile_rows, latents)
            passing = ~(values < pool.bar) & ~(values <= 0)
            tile_rows, latents, values = tile_rows[passing], latents[passing], values[passing]
        pool.add(tile_rows, latents, values)
    return pad_rows(*pool.pairs(), x_ND.shape[0])
