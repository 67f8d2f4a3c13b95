"""``encode_topk`` in blocks of rows: one [rows, F] tile at a time, k survivors per row kept."""

import torch

# Elements of one tile of pre-activations. Large enough for the matrix product to run at full speed, small enough that
# the tile is still in the last-level cache when the selection reads it.
TILE_ELEMENTS = 1 << 22


def encode_topk(x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``."""
    num_rows, num_latents = x_ND.shape[0], W_FD.shape[0]
    tile_rows = max(1, TILE_ELEMENTS // num_latents)
    values_NK = x_ND.new_empty(num_rows, k)
    indices_NK = torch.empty(num_rows, k, dtype=torch.int64, device=x_ND.device)
    tile = x_ND.new_empty(min(tile_rows, num_rows), num_latents)
    for start in range(0, num_rows, tile_rows):
        x_tile = x_ND[start : start + tile_rows]
        rows = slice(start, start + x_tile.shape[0])
        z_tile = torch.addmm(b_F, x_tile, W_FD.T, out=tile[: x_tile.shape[0]])
        values_NK[rows], indices_NK[rows] = select_topk(z_tile, k)
    values_NK.relu_()
    return values_NK, indices_NK.masked_fill_(values_NK == 0, -1)


def select_topk(z_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly k largest per row, descending; equal values in index order, so the lowest index wins a tie."""
    num_latents = z_NF.shape[1]
    values, indices = z_NF.topk(min(k + 1, num_latents), dim=1)
    # topk leaves the order of equal values open: redo the rows where that could show.
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).any(dim=1)
    if bool(tied.any()):
        rows = tied.nonzero().squeeze(1)
        sorted_values, sorted_indices = z_NF[rows].sort(dim=1, descending=True, stable=True)
        values[rows] = sorted_values[:, : values.shape[1]]
        indices[rows] = sorted_indices[:, : values.shape[1]]
    return values[:, :k], indices[:, :k]
