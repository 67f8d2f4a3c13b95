"""``encode_topk`` in blocks of rows: one [rows, F] tile at a time, k survivors per row kept.

Where a bfloat16 product is faster, it leaves out what can't be among the k largest, and float32 decides between the
rest; a row with more candidates than are looked at is done again with the float32 product. Either way the picks are
float32's.
"""

import torch

from shared.kernels.encode_topk.bounds import ROUNDING, Bounds, bounds_pay, exact_values, row_tiles
from shared.kernels.linear import linear

# Latents whose maximum stands for them in the first round of the selection.
GROUP = 16


@torch.no_grad()
def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``."""
    if bounds_pay(x_ND, compute_dtype) and 4 * _first_width(k) <= W_FD.shape[0]:
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


def _pick_by_bounds(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest of each row, and the rows [R] for which that is not sure: they have too many candidates."""
    values_NK = x_ND.new_empty(x_ND.shape[0], k)
    indices_NK = torch.empty(x_ND.shape[0], k, dtype=torch.int64)
    bounds, width = Bounds(x_ND, W_FD, b_F), _first_width(k)
    tiles, undecided = bounds.tiles(), [indices_NK[:0, 0]]
    for number, rows_T in enumerate(tiles, 1):
        upper_TW, latents_TW = _largest_bounds(bounds.of(rows_T), width)
        # The k with the largest bounds are not the k largest, but the least of them is a bar: the k largest reach it.
        first_P = latents_TW[:, :k].flatten()
        z_TK = exact_values(x_ND, W_FD, b_F, rows_T.repeat_interleave(k), first_P).view(-1, k)
        may_be_TW = (upper_TW >= z_TK.amin(1, keepdim=True)) & (upper_TW > 0)
        undecided.append(rows_T[may_be_TW[:, -1] | ~upper_TW[:, 0].isfinite()])
        num_candidates_T = may_be_TW.sum(1)
        width_used = max(k, int(num_candidates_T.max()))
        more_TC = may_be_TW[:, k:width_used]
        z_TC = z_TK.new_full(more_TC.shape, -torch.inf)
        places_P, _ = more_TC.nonzero(as_tuple=True)
        z_TC[more_TC] = exact_values(x_ND, W_FD, b_F, rows_T[places_P], latents_TW[:, k:width_used][more_TC])
        latents_TC, order_TC = latents_TW[:, :width_used].sort(dim=1)  # equal values are taken in index order
        values_NK[rows_T], slots_TK = select_topk(torch.cat([z_TK, z_TC], 1).gather(1, order_TC), k)
        indices_NK[rows_T] = latents_TC.gather(1, slots_TK)
        if sum(map(len, undecided)) > max(len(x_ND) // 8, sum(map(len, tiles[:number])) // 2):
            undecided += tiles[number:]  # these inputs are not for bounds
            break
        width = _next_width(num_candidates_T, width, k, W_FD.shape[0])
    return values_NK, indices_NK, torch.cat(undecided)


def _largest_bounds(upper_TF: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper bounds [T, W] in float32 in descending order, those below 0 as 0, and their latents."""
    # Positive floats order like their bits, and integers have the faster maximum. What is negative can't be picked.
    bits_TW, latents_TW = topk_by_groups(upper_TF.view(torch.int16), width)
    return bits_TW.view(torch.bfloat16).float().clamp_min_(0) * (1 + ROUNDING), latents_TW


def _first_width(k: int) -> int:
    """Candidates to look at in a row; measured on trained SAEs: 1.1 k on average and 2 k at most."""
    return 2 * k + 16


def _next_width(num_candidates_T: torch.Tensor, width: int, k: int, num_latents: int) -> int:
    """The width after a tile whose rows had so many candidates; not for the sake of a few odd rows."""
    most = int(num_candidates_T.sort().values[-1 - len(num_candidates_T) // 50])
    width = 2 * width if most >= width else most + most // 4 + 8
    return min(max(width, k + 8), 8 * k + 64, num_latents // 4)


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
