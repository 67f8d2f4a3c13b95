"""``encode_topk`` in blocks of rows: one [rows, F] tile at a time, k survivors per row kept.

Where a bfloat16 product is faster, it leaves out what can't be among the k largest, and float32 decides between the
rest; a row with more candidates than are kept is done again with the float32 product. Either way the picks are
float32's.
"""

import torch

from shared.kernels.encode_topk.bounds import ROUNDING, Bounds, UpperTile, bounds_pay, exact_values, row_tiles
from shared.kernels.linear import linear

# Latents whose maximum stands for them in the first round of the selection.
GROUP = 16


@torch.no_grad()
def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``."""
    if bounds_pay(x_ND, compute_dtype) and 4 * _kept_width(k) <= W_FD.shape[0]:
        values_NK, indices_NK, rows_R = _pick_by_bounds(x_ND, W_FD, b_F, k)
        if rows_R.numel():
            values_NK[rows_R], indices_NK[rows_R] = _pick_by_product(x_ND[rows_R], W_FD, b_F, k)
    else:
        values_NK, indices_NK = _pick_by_product(x_ND, W_FD, b_F, k)
    values_NK.relu_()
    return values_NK, indices_NK.masked_fill_(values_NK == 0, -1)


def _pick_by_product(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, by a product in the type of the inputs."""
    values_NK = x_ND.new_empty(x_ND.shape[0], k)
    indices_NK = torch.empty(x_ND.shape[0], k, dtype=torch.int64, device=x_ND.device)
    for rows_T in row_tiles(x_ND, W_FD):
        part = slice(int(rows_T[0]), int(rows_T[-1]) + 1)
        values_NK[part], indices_NK[part] = select_topk(linear(x_ND[part], W_FD, b_F), k)
    return values_NK, indices_NK


def _kept_width(k: int) -> int:
    """Candidates kept of a row. Measured: a trained SAE has 1.2 k on average and 2.2 k at most, random weights 2.1 k."""
    return 3 * k + 16


def _pick_by_bounds(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest of each row where a bfloat16 product tells who they may be, and the rows [R] where it does not."""
    values_NK = x_ND.new_empty(x_ND.shape[0], k)
    indices_NK = torch.empty(x_ND.shape[0], k, dtype=torch.int64)
    bounds = Bounds(x_ND, W_FD, b_F)
    tiles, undecided = bounds.tiles(), [indices_NK[:0, 0]]
    for number, tile_rows_T in enumerate(tiles, 1):
        latents_TC, decided_T = _candidates(bounds.of(tile_rows_T), k, _kept_width(k))
        undecided.append(tile_rows_T[~decided_T])
        rows_T, latents_TC = tile_rows_T[decided_T], latents_TC[decided_T].sort(dim=1).values  # ties in index order
        present_TC = latents_TC >= 0
        places_P, _ = present_TC.nonzero(as_tuple=True)
        z_TC = x_ND.new_full(latents_TC.shape, -torch.inf)
        z_TC[present_TC] = exact_values(x_ND, W_FD, b_F, rows_T[places_P], latents_TC[present_TC])
        values_NK[rows_T], slots_TK = select_topk(z_TC, k)
        indices_NK[rows_T] = latents_TC.gather(1, slots_TK)
        if sum(map(len, undecided)) > max(x_ND.shape[0] // 8, sum(map(len, tiles[:number])) // 2):
            undecided += tiles[number:]  # these inputs are not for bounds
            break
    return values_NK, indices_NK, torch.cat(undecided)


def _candidates(tile: UpperTile, k: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [T, C] that may be among a row's k largest and positive, -1 behind them, and where they are all [T].

    C >= k is what the decided row with most of them needs.
    """
    # Positive floats order like their bits, and integers have the faster maximum. What is negative can't be picked.
    bits_TW, latents_TW = topk_by_groups(tile.upper_TF.view(torch.int16), width)
    upper_TW = bits_TW.view(torch.bfloat16).float().clamp_min_(0)
    lower_TW = upper_TW * (1 - ROUNDING) - 2 * tile.slack_F[latents_TW]
    bar_T1 = lower_TW.topk(k, dim=1).values[:, -1:].clamp_min_(0)  # k latents are at least this, or z is positive
    upper_TW = upper_TW * (1 + ROUNDING)
    may_be_TW = (upper_TW >= bar_T1) & (upper_TW > 0)
    decided_T = ~may_be_TW[:, -1] & upper_TW[:, 0].isfinite() & tile.slack_F.isfinite().all()
    num_kept = max(k, int(may_be_TW[decided_T].sum(1).max())) if bool(decided_T.any()) else k
    return latents_TW.masked_fill(~may_be_TW, -1)[:, :num_kept], decided_T


def select_topk(z_NF: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exactly k largest per row, descending; equal positive values in index order, so the lowest index wins a tie."""
    num_latents = z_NF.shape[1]
    width = min(k + 1, num_latents)
    values, indices = topk_by_groups(z_NF, width)
    # topk leaves the order of equal values open: redo the rows where that could show.
    tied = ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).any(dim=1)
    if bool(tied.any()):
        rows = tied.nonzero().squeeze(1)
        sorted_values, sorted_indices = z_NF[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = sorted_values[:, :width], sorted_indices[:, :width]
    return values[:, :k], indices[:, :k]


def topk_by_groups(z_NF: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
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
