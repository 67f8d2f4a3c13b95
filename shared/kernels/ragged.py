"""Pairs (row, latent, value) of a batch, in any number per row, to the padded interchange form [N, M].

Shapes: N rows, P pairs, M the batch's largest number of pairs in a row (at least 1).
"""

import torch

# Entries of a matrix of booleans that are looked at at once, as one int64.
WORD = 8
# With more than one word in so many entries, the way over words is the slower one.
FEW = 64


def pad_rows(
    rows_P: torch.Tensor, latents_P: torch.Tensor, values_P: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, M] in descending order and int64 indices [N, M]; value 0 and index -1 behind them.

    Pairs come in any order but must be distinct. Equal values of a row are put in latent order.
    """
    # Two stable sorts: by latent, then by row.
    latents_P, order_P = torch.sort(latents_P, stable=True)
    rows_P, values_P = rows_P[order_P], values_P[order_P]
    rows_P, order_P = torch.sort(rows_P, stable=True)
    return pad_ordered(rows_P, latents_P[order_P], values_P[order_P], num_rows)


def pad_tiles(
    rows_P: torch.Tensor, latents_P: torch.Tensor, values_P: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``pad_rows`` for pairs whose latents ascend within each row: one sort, by row."""
    rows_P, order_P = torch.sort(rows_P, stable=True)
    return pad_ordered(rows_P, latents_P[order_P], values_P[order_P], num_rows)


def pad_ordered(
    rows_P: torch.Tensor, latents_P: torch.Tensor, values_P: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``pad_rows`` for pairs that come in row order and, within a row, in latent order."""
    starts_N = torch.searchsorted(rows_P, torch.arange(num_rows + 1, device=rows_P.device, dtype=rows_P.dtype))
    width = max(1, int((starts_N[1:] - starts_N[:-1]).max())) if num_rows else 1
    slots_P = torch.arange(rows_P.numel(), device=rows_P.device) - starts_N[rows_P]
    values_NM = values_P.new_full((num_rows, width), -torch.inf)
    indices_NM = latents_P.new_full((num_rows, width), -1, dtype=torch.int64)
    values_NM[rows_P, slots_P] = values_P
    indices_NM[rows_P, slots_P] = latents_P.to(torch.int64)
    values_NM, order_NM = torch.sort(values_NM, dim=1, descending=True, stable=True)
    indices_NM = indices_NM.gather(1, order_NM)
    return values_NM.masked_fill_(indices_NM < 0, 0), indices_NM


def true_places(kept_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``kept.nonzero(as_tuple=True)`` of a contiguous matrix; four times as fast on a CPU where few are true."""
    if kept_TF.device.type != "cpu" or kept_TF.numel() % WORD:
        rows_P, columns_P = kept_TF.nonzero(as_tuple=True)
        return rows_P, columns_P
    words_W = kept_TF.view(-1).view(torch.int64).nonzero().squeeze(1)
    if len(words_W) * FEW > kept_TF.numel():
        rows_P, columns_P = kept_TF.nonzero(as_tuple=True)
        return rows_P, columns_P
    which_P, inside_P = kept_TF.view(-1, WORD)[words_W].nonzero(as_tuple=True)
    places_P = words_W[which_P] * WORD + inside_P
    return places_P // kept_TF.shape[1], places_P % kept_TF.shape[1]


def pad_dense(z_NF: torch.Tensor, kept_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``pad_rows`` of the entries of a dense matrix where `kept_NF` is true."""
    rows_P, latents_P = kept_NF.nonzero(as_tuple=True)
    return pad_ordered(rows_P, latents_P, z_NF[rows_P, latents_P], z_NF.shape[0])
