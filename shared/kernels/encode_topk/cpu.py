"""``encode_topk`` in blocks of rows: one [rows, F] tile at a time, k survivors per row kept."""

import torch

from shared.kernels.decode.cpu import dot_picks
from shared.kernels.encode_topk.candidates import RowTiles

# Latents whose maximum stands for them in the first round of the selection.
GROUP = 16


def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``."""
    tiles = RowTiles(x_ND, W_FD, b_F, compute_dtype)
    num_kept = min(k + max(4, k // 4), W_FD.shape[0]) if tiles.nominates else k
    values_NK = x_ND.new_empty(x_ND.shape[0], num_kept)
    indices_NK = torch.empty(x_ND.shape[0], num_kept, dtype=torch.int64, device=x_ND.device)
    for rows, z_tile in tiles:
        select = _topk_by_groups if tiles.nominates else select_topk  # candidates may tie as they like
        values_NK[rows], indices_NK[rows] = select(z_tile, num_kept)
    if tiles.nominates:
        candidates_NC = indices_NK.sort(dim=1).values  # index order, so that equal values stay in it
        z_NC = dot_picks(x_ND, candidates_NC, W_FD).add_(b_F[candidates_NC])
        values_NK, order_NK = select_topk(z_NC, k)
        indices_NK = candidates_NC.gather(1, order_NK)
    values_NK.relu_()
    return values_NK, indices_NK.masked_fill_(values_NK == 0, -1)


def select_topk(z_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly k largest per row, descending; equal positive values in index order, so the lowest index wins a tie."""
    num_latents = z_NF.shape[1]
    width = min(k + 1, num_latents)
    values, indices = _topk_by_groups(z_NF, width)
    # topk leaves the order of equal values open: redo the rows where that could show.
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).any(dim=1)
    if bool(tied.any()):
        rows = tied.nonzero().squeeze(1)
        sorted_values, sorted_indices = z_NF[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = sorted_values[:, :width], sorted_indices[:, :width]
    return values[:, :k], indices[:, :k]


def _topk_by_groups(z_NF: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``topk`` in two rounds: the `width` largest values all lie in the `width` groups with the largest maxima."""
    num_rows, num_latents = z_NF.shape
    num_groups = num_latents // GROUP
    if num_latents % GROUP or num_groups < 2 * width:
        return z_NF.topk(width, dim=1)
    z_NGg = z_NF.view(num_rows, GROUP, num_groups)  # group g holds latents g, g + num_groups, ...
    groups = z_NGg.amax(1).topk(width, dim=1, sorted=False).indices
    finalists = z_NGg.gather(2, groups[:, None, :].expand(-1, GROUP, -1)).flatten(1)
    values, position = finalists.topk(width, dim=1)
    return values, groups.gather(1, position % width) + (position // width) * num_groups
