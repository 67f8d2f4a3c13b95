"""Latents that attend, one tile of contexts and heads at a time: no [N, F] tensor of theirs and no pattern is kept.

A tile is [contexts, heads, T, T] scores, or one context and one head where T is large. The backward pass makes a tile
again and differentiates it where it stands. The same matrix products on every device.

Shapes: C contexts, T positions, N of them that count, D width of what is read, H heads, F latents, L = F / H of a head,
S = C T, K picks per row, P pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels.attention.pattern import Form, QueryKey, patterns
from shared.kernels.compute import Compute
from shared.kernels.encode_batchtopk.pool import Pool
from shared.kernels.encode_topk.torch_ import select_topk
from shared.kernels.product import product
from shared.kernels.ragged import pad_rows, pad_tiles

# Scores of a tile: 64 MiB, of which a backward pass holds about six times as much.
TILE_SCORES = 1 << 24


@dataclass(frozen=True, slots=True)
class Attended:
    """What is read, and by which heads."""

    x_CTD: Tensor
    documents_CT: Tensor
    places_N: Tensor
    """int64, ascending: c * T + t of the positions that count."""
    heads: QueryKey
    form: Form
    compute: Compute


Spread = Callable[[slice, slice], Tensor]
"""The gradient of a tile's values [S of it, its latents], from its contexts and its heads."""


def tiles(read: Attended) -> Iterator[tuple[slice, slice]]:
    """(Contexts, heads) of each tile; all heads of some contexts, then the next contexts."""
    C, T, _ = read.x_CTD.shape
    H = len(read.heads.W_Q_GED)
    heads = max(1, min(H, TILE_SCORES // (T * T)))
    contexts = max(1, min(C, TILE_SCORES // (T * T * heads)))
    for context in range(0, C, contexts):
        for head in range(0, H, heads):
            yield slice(context, min(context + contexts, C)), slice(head, min(head + heads, H))


def values_of(read: Attended, contexts: slice, heads: QueryKey, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """z [S of these contexts, latents of these heads], equally many of each head; differentiable in all weights."""
    x_CTD = read.x_CTD[contexts]
    A_CGTT = patterns(x_CTD, read.documents_CT[contexts], heads, read.form, read.compute)
    return mixed(A_CGTT, x_CTD, W_FD, read.compute) + b_F


def mixed(A_CGTT: Tensor, x_CTD: Tensor, W_FD: Tensor, compute: Compute) -> Tensor:
    """``sum_s A[t, s] W x_s`` [S, F], each latent by its head's pattern."""
    C, T, D = x_CTD.shape
    G = A_CGTT.shape[1]
    v_SF = product(x_CTD.reshape(C * T, D), W_FD.T, compute=compute)
    v_CGTL = v_SF.view(C, T, G, -1).transpose(1, 2)
    return (A_CGTT @ v_CGTL).transpose(1, 2).reshape(C * T, -1)


def latents_of(heads: slice, per_head: int) -> slice:
    """Those of some heads."""
    return slice(heads.start * per_head, heads.stop * per_head)


def _forward(read: Attended, W_FD: Tensor, b_F: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(Contexts, latents, z [S, latents]) of every tile, without gradient."""
    per_head = len(W_FD) // len(read.heads.W_Q_GED)
    for contexts, heads in tiles(read):
        own = latents_of(heads, per_head)
        yield contexts, own, values_of(read, contexts, read.heads.heads(heads), W_FD[own], b_F[own])


@torch.no_grad()
def topk(read: Attended, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest per position, as ``encode_topk`` gives them: those of the tiles so far against the next tile's."""
    C, T, _ = read.x_CTD.shape
    values_SK = W_FD.new_empty(C * T, k)
    indices_SK = torch.empty(C * T, k, dtype=torch.int64, device=W_FD.device)
    best: tuple[Tensor, Tensor] | None = None
    for contexts, own, z_RL in _forward(read, W_FD, b_F):
        values, places = select_topk(z_RL, min(k, z_RL.shape[1]))
        latents = places + own.start
        if own.start and best is not None:
            values, latents = torch.cat([best[0], values], 1), torch.cat([best[1], latents], 1)
            values, places = select_topk(values, min(k, values.shape[1]))
            latents = latents.gather(1, places)
        best = values, latents
        if own.stop == len(W_FD):
            rows = slice(contexts.start * T, contexts.stop * T)
            values_SK[rows], indices_SK[rows] = best
    values_NK = values_SK.index_select(0, read.places_N).relu_()
    return values_NK, indices_SK.index_select(0, read.places_N).masked_fill_(values_NK == 0, -1)


def _pairs(
    read: Attended, W_FD: Tensor, b_F: Tensor, bar: Callable[[slice], Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows (of N), latents and values above the bar of a tile's latents; rows of a tile, then latents, ascend."""
    C, T, _ = read.x_CTD.shape
    number_S = torch.full((C * T,), -1, dtype=torch.int64, device=W_FD.device)
    number_S[read.places_N] = torch.arange(len(read.places_N), device=W_FD.device)
    for contexts, own, z_RL in _forward(read, W_FD, b_F):
        number_R = number_S[contexts.start * T : contexts.stop * T]
        kept_RL = ~(z_RL <= bar(own)) & (number_R >= 0)[:, None]
        rows_P, latents_P = kept_RL.nonzero(as_tuple=True)
        yield number_R[rows_P], latents_P + own.start, z_RL[rows_P, latents_P]


@torch.no_grad()
def above(read: Attended, W_FD: Tensor, b_F: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """All above a threshold, a scalar or [F], as ``encode_threshold`` gives them."""
    threshold_F = threshold.expand(len(W_FD))
    parts = [(read.places_N[:0], read.places_N[:0], W_FD[:0, 0])]
    parts += _pairs(read, W_FD, b_F, lambda own: threshold_F[own])
    rows_P, latents_P, values_P = (torch.cat(part) for part in zip(*parts, strict=True))
    return pad_tiles(rows_P, latents_P, values_P, len(read.places_N))


@torch.no_grad()
def largest_of_batch(read: Attended, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The N k largest of all positions, as ``encode_batchtopk`` gives them."""
    pool = Pool(len(read.places_N) * k, len(W_FD), W_FD)
    for rows_P, latents_P, values_P in _pairs(read, W_FD, b_F, lambda own: pool.bar):
        positive_P = ~(values_P <= 0)
        pool.add(rows_P[positive_P], latents_P[positive_P], values_P[positive_P])
    return pad_rows(*pool.pairs(), len(read.places_N))


@torch.no_grad()
def everything(read: Attended, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """z [N, F] of all latents, for activations that train densely."""
    C, T, _ = read.x_CTD.shape
    z_SF = W_FD.new_empty(C * T, len(W_FD))
    for contexts, own, z_RL in _forward(read, W_FD, b_F):
        z_SF[contexts.start * T : contexts.stop * T, own] = z_RL
    return z_SF.index_select(0, read.places_N)


def spread_pairs(read: Attended, dz_NK: Tensor, indices_NK: Tensor, per_head: int) -> Spread:
    """The gradient of picks, tile by tile."""
    C, T, _ = read.x_CTD.shape
    dz_SK = dz_NK.new_zeros(C * T, dz_NK.shape[1]).index_copy_(0, read.places_N, dz_NK)
    indices_SK = indices_NK.new_full(dz_SK.shape, -1).index_copy_(0, read.places_N, indices_NK)

    def of(contexts: slice, heads: slice) -> Tensor:
        rows, own = slice(contexts.start * T, contexts.stop * T), latents_of(heads, per_head)
        width, local_RK = own.stop - own.start, indices_SK[rows] - own.start
        # What lies elsewhere falls into one more column. A row's picks are distinct: no two meet in another.
        local_RK = torch.where((local_RK >= 0) & (local_RK < width), local_RK, width)
        return dz_SK.new_zeros(len(local_RK), width + 1).scatter_add_(1, local_RK, dz_SK[rows])[:, :width]

    return of


def spread_rows(read: Attended, dz_NF: Tensor, per_head: int) -> Spread:
    """The same of the gradient of all latents."""
    C, T, _ = read.x_CTD.shape

    def of(contexts: slice, heads: slice) -> Tensor:
        own = latents_of(heads, per_head)
        dz_SL = dz_NF.new_zeros(C * T, own.stop - own.start).index_copy_(0, read.places_N, dz_NF[:, own])
        return dz_SL[contexts.start * T : contexts.stop * T]

    return of


def gradients(read: Attended, W_FD: Tensor, b_F: Tensor, spread: Spread) -> list[Tensor | None]:
    """Return those of W, b and the heads' weights, in their order; each tile is made again and differentiated."""
    weights = (W_FD, b_F, *read.heads.tensors())
    found = [None if weight is None else torch.zeros_like(weight) for weight in weights]
    per_head = len(W_FD) // len(read.heads.W_Q_GED)
    for contexts, heads in tiles(read):
        own = latents_of(heads, per_head)
        places = [own, own, *[heads] * len(read.heads.tensors())]
        parts = [
            None if weight is None else weight[place].detach().requires_grad_()
            for weight, place in zip(weights, places, strict=True)
        ]
        with torch.enable_grad():
            W_LD, b_L, *rest = parts
            assert W_LD is not None
            assert b_L is not None
            z_RL = values_of(read, contexts, QueryKey(*rest), W_LD, b_L)  # type: ignore[arg-type]
        wanted = [part for part in parts if part is not None]
        grads = iter(torch.autograd.grad(z_RL, wanted, spread(contexts, heads)))
        for total, place, part in zip(found, places, parts, strict=True):
            if total is not None and part is not None:
                total[place] += next(grads)
    idle = read.form.idle_from
    if idle is not None:
        db_K_HE = found[2 + QueryKey.__match_args__.index("b_K_GE")]
        assert db_K_HE is not None
        db_K_HE[:, idle:] = 0
    return found
