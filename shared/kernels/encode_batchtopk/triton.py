"""``encode_batchtopk`` on a GPU: ``collect_above`` with a bar that rises from tile to tile.

It waits for the device in every tile: the pool is cut on the host. A step of training does not come here, it keeps what
reaches the bar of the step before (``encode_threshold``).
"""

import torch

from shared.kernels.encode_batchtopk.pool import Pool
from shared.kernels.encode_threshold.triton import Tile, collect_above
from shared.kernels.encode_topk.triton import tiles
from shared.kernels.ragged import pad_rows


def encode_batchtopk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_batchtopk.encode_batchtopk``. Values are float32 whatever the inputs' type."""
    num_rows, num_latents = x_ND.shape[0], W_FD.shape[0]
    pool = Pool(num_rows * k, num_latents, torch.empty(0, dtype=torch.float32, device=x_ND.device))
    for rows, columns, z_TC in tiles(x_ND, W_FD, compute_dtype):
        tile = Tile(rows, columns, z_TC, b_F, pool.bar.expand(num_latents), batch=True)
        pool.add(*collect_above(tile))
    return pad_rows(*pool.pairs(), num_rows)
