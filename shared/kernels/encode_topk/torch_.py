"""``encode_topk`` in blocks of rows: one [rows, F] tile at a time, k survivors per row kept.

Where a bfloat16 product is faster, it leaves out what can't be among the k largest, and float32 decides between the
rest; a row with more candidates than are looked at is done again with the float32 product. Either way the picks are
float32's. With compute_dtype bfloat16 such a product chooses the candidates without proof.
"""

import torch

from shared.kernels.decode.torch_ import dot_picks
from shared.kernels.encode_topk.bounds import ROUNDING, Bounds, bounds_apply, bounds_pay, exact_values, row_tiles
from shared.kernels.linear import linear

# Latents whose maximum stands for them in the first round of the selection.
GROUP = 16


@torch.no_grad()
def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``."""
    if compute_dtype == "bfloat16" and bounds_apply(x_ND):
        values_NK, indices_NK = _pick_by_nomination(x_ND, W_FD, b_F, k)
    elif bounds_pay(x_ND, W_FD) and 4 * _first_width(k) <= W_FD.shape[0]:
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


def _pick_by_nomination(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest in float32 of the k + k / 4 that are largest in bfloat16: what compute_dtype bfloat16 asks for."""
    num_latents = W_FD.shape[0]
    width = min(k + max(4, k // 4), num_latents)
    x16_ND, W16_FD, b16_F = x_ND.bfloat16(), W_FD.bfloat16(), b_F.bfloat16()
    latents_NC = torch.empty(x_ND.shape[0], width, dtype=torch.int64)
    for rows_T in row_tiles(x_ND, W_FD):
        part = slice(int(rows_T[0]), int(rows_T[-1]) + 1)
        _, latents_NC[part] = topk_by_groups(linear(x16_ND[part], W16_FD, b16_F).view(torch.int16), width)
    latents_NC = latents_NC.sort(dim=1).values  # equal values are taken in index order
    values_NK, slots_NK = select_topk(dot_picks(x_ND, latents_NC, W_FD).add_(b_F[latents_NC]), k)
    return values_NK, latents_NC.gather(1, slots_NK)


def _pick_by_bounds(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest of each row, and the rows [R] for which that is not sure: they have too many candidates."""
    bounds, num_rows = Bounds(x_ND, W_FD, b_F), x_ND.shape[0]
    values_NK, rows_N = x_ND.new_empty(num_rows, k), torch.arange(num_rows)
    tiles = bounds.tiles()
    if not tiles:
        return values_NK, values_NK.long(), rows_N
    probe_T = tiles[len(tiles) // 2]
    probe_TF = bounds.of(probe_T)
    width = _find_width(probe_TF, probe_T, x_ND, W_FD, b_F, k)
    if width is None:  # these inputs are not for bounds
        return values_NK, values_NK.long(), rows_N
    upper_NW, latents_NW = x_ND.new_empty(num_rows, width), rows_N.new_empty(num_rows, width)
    for rows_T in tiles:
        upper_TF = probe_TF if rows_T is probe_T else bounds.of(rows_T)
        upper_NW[rows_T], latents_NW[rows_T] = _largest_bounds(upper_TF, width)

    z_NK, may_be_NW = _candidates(upper_NW, latents_NW, rows_N, x_ND, W_FD, b_F, k)
    undecided_N = may_be_NW[:, -1] | ~upper_NW[:, 0].isfinite()
    more_NC = (may_be_NW & ~undecided_N[:, None])[:, k:]
    more_NC = more_NC[:, : int(more_NC.sum(1).max())]
    latents_NC = latents_NW[:, : k + more_NC.shape[1]]
    z_NC = z_NK.new_full(more_NC.shape, -torch.inf)
    z_NC[more_NC] = exact_values(x_ND, W_FD, b_F, more_NC.nonzero()[:, 0], latents_NC[:, k:][more_NC])
    latents_NC, order_NC = latents_NC.sort(dim=1)  # equal values are taken in index order
    values_NK, slots_NK = select_topk(torch.cat([z_NK, z_NC], 1).gather(1, order_NC), k)
    return values_NK, latents_NC.gather(1, slots_NK), rows_N[undecided_N]


def _candidates(
    upper_TW: torch.Tensor,
    latents_TW: torch.Tensor,
    rows_T: torch.Tensor,
    x_ND: torch.Tensor,
    W_FD: torch.Tensor,
    b_F: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [T, k] of the latents with the k largest bounds, and which [T, W] may be among the k largest and positive."""
    first_P = latents_TW[:, :k].flatten()
    z_TK = exact_values(x_ND, W_FD, b_F, rows_T.repeat_interleave(k), first_P).view(-1, k)
    # They need not be the k largest, but the least of them is a bar: the k largest reach it.
    return z_TK, (upper_TW >= z_TK.amin(1, keepdim=True)) & (upper_TW > 0)


def _find_width(
    upper_TF: torch.Tensor, rows_T: torch.Tensor, x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int
) -> int | None:
    """How many candidates to look at in a row, from what those of a tile have; None if most have too many."""
    width, widest = _first_width(k), min(8 * k + 64, W_FD.shape[0] // 4)
    while True:
        upper_TW, latents_TW = _largest_bounds(upper_TF, width)
        _, may_be_TW = _candidates(upper_TW, latents_TW, rows_T, x_ND, W_FD, b_F, k)
        counts_T = (may_be_TW.sum(1) + width * ~upper_TW[:, 0].isfinite()).sort().values
        if counts_T[-1 - len(counts_T) // 50] < width:  # but for a few odd rows
            most = int(counts_T[-1 - len(counts_T) // 50])
            return min(max(most + most // 3, k) + 8, widest)
        if width == widest:
            return width if counts_T[len(counts_T) // 2] < width else None
        width = min(2 * width, widest)


def _largest_bounds(upper_TF: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper bounds [T, W] in float32 in descending order, those below 0 as 0, and their latents."""
    # Positive floats order like their bits, and integers have the faster maximum. What is negative can't be picked.
    bits_TW, latents_TW = topk_by_groups(upper_TF.view(torch.int16), width)
    return bits_TW.view(torch.bfloat16).float().clamp_min_(0) * (1 + ROUNDING), latents_TW


def _first_width(k: int) -> int:
    """Candidates to look at in a row; measured on trained SAEs: 1.1 k on average and 2 k at most."""
    return 2 * k + 16


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
