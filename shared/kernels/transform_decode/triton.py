"""``transform_decode`` on a GPU: grouped products over tiles of pairs that share a transform, no atomics.

The sorted pairs of each transform are cut into tiles of BLOCK_P. Which tiles there are is found on the device, so that
nothing waits for it: there are at most P / BLOCK_P + F, and programs of a tile that is not there do nothing.

    _project   h_p = V_i x           rows of x gathered by token, one product with the rows of a transform
    _expand    value_p U_i h_p       of some columns at a time, which ``decode`` then adds up token by token
    _outer     sum_p value_p h_p x   of one transform: its gradient, by the program that owns it

The first also gives ``U_i^T g`` of the backward pass, the last both gradients.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.kernels.decode.triton import decode
from shared.kernels.pairs import PairOrder
from shared.kernels.transform_decode.ranks import Ranks

# Pairs, ranks and columns of one program; a product needs at least 16 of each.
BLOCK_P = 64
BLOCK_R = 32
BLOCK_D = 64
# Columns of ``_expand`` in one turn, which bounds the memory of the pairs' parts.
COLUMNS = 1024


@triton.jit
def _project(
    rows_ptr, tokens_ptr, latents_ptr, firsts_ptr, lasts_ptr, offsets_ptr, W_ptr, out_ptr, D, H,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[p, c] = rows[token_p] . W[offset_i + c]`` for the pairs of one tile and a block of ranks."""
    tile, first_rank = tl.program_id(0), tl.program_id(1) * BLOCK_R
    first, last = tl.load(firsts_ptr + tile), tl.load(lasts_ptr + tile)
    latent = tl.load(latents_ptr + tile)
    offset = tl.load(offsets_ptr + latent)
    rank = tl.load(offsets_ptr + latent + 1) - offset
    if (first < last) & (first_rank < rank):
        pairs, ranks = first + tl.arange(0, BLOCK_P), first_rank + tl.arange(0, BLOCK_R)
        has_pair, has_rank = pairs < last, ranks < rank
        tokens = tl.load(tokens_ptr + pairs, mask=has_pair, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_P, BLOCK_R], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < D
            rows_at = rows_ptr + tokens[:, None] * D + columns[None, :]
            rows = tl.load(rows_at, mask=has_pair[:, None] & inside[None, :], other=0.0)
            W_at = W_ptr + (offset + ranks)[None, :] * D + columns[:, None]
            W = tl.load(W_at, mask=has_rank[None, :] & inside[:, None], other=0.0)
            total = tl.dot(rows, W, total, input_precision="ieee")
        out_at = out_ptr + pairs.to(tl.int64)[:, None] * H + ranks[None, :]
        tl.store(out_at, total, mask=has_pair[:, None] & has_rank[None, :])


@triton.jit
def _expand(
    h_ptr, values_ptr, latents_ptr, firsts_ptr, lasts_ptr, offsets_ptr, W_ptr, out_ptr, D, H, first_column, num_columns,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[p, e] = value_p sum_c h[p, c] W[offset_i + c, first_column + e]`` for one tile and a block of columns."""
    tile = tl.program_id(0)
    first, last = tl.load(firsts_ptr + tile), tl.load(lasts_ptr + tile)
    if first < last:
        latent = tl.load(latents_ptr + tile)
        offset = tl.load(offsets_ptr + latent)
        rank = (tl.load(offsets_ptr + latent + 1) - offset).to(tl.int32)
        pairs, columns = first + tl.arange(0, BLOCK_P), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        has_pair = pairs < last
        inside = (columns < num_columns) & (first_column + columns < D)
        values = tl.load(values_ptr + pairs, mask=has_pair, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float32)
        for start in range(0, rank, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            has_rank = ranks < rank
            h_at = h_ptr + pairs.to(tl.int64)[:, None] * H + ranks[None, :]
            h = tl.load(h_at, mask=has_pair[:, None] & has_rank[None, :], other=0.0)
            W_at = W_ptr + (offset + ranks)[:, None] * D + (first_column + columns)[None, :]
            W = tl.load(W_at, mask=has_rank[:, None] & inside[None, :], other=0.0)
            total = tl.dot(h.to(W.dtype), W, total, input_precision="ieee")
        out_at = out_ptr + pairs.to(tl.int64)[:, None] * num_columns + columns[None, :]
        tl.store(out_at, total * values[:, None], mask=has_pair[:, None] & inside[None, :])


@triton.jit
def _outer(
    h_ptr, values_ptr, tokens_ptr, starts_ptr, offsets_ptr, rows_ptr, out_ptr, D, H,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[offset_i + c] = sum over its pairs of value_p h[p, c] rows[token_p]``, a block of ranks and of columns."""
    latent, first_rank = tl.program_id(0), tl.program_id(1) * BLOCK_R
    offset = tl.load(offsets_ptr + latent)
    rank = tl.load(offsets_ptr + latent + 1) - offset
    if first_rank < rank:
        first, last = tl.load(starts_ptr + latent).to(tl.int32), tl.load(starts_ptr + latent + 1).to(tl.int32)
        ranks, columns = first_rank + tl.arange(0, BLOCK_R), tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        has_rank, inside = ranks < rank, columns < D
        total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for start in range(first, last, BLOCK_P):
            pairs = start + tl.arange(0, BLOCK_P)
            has_pair = pairs < last
            tokens = tl.load(tokens_ptr + pairs, mask=has_pair, other=0).to(tl.int64)
            values = tl.load(values_ptr + pairs, mask=has_pair, other=0.0).to(tl.float32)
            h_at = h_ptr + pairs.to(tl.int64)[None, :] * H + ranks[:, None]
            h = tl.load(h_at, mask=has_pair[None, :] & has_rank[:, None], other=0.0) * values[None, :]
            rows_at = rows_ptr + tokens[:, None] * D + columns[None, :]
            rows = tl.load(rows_at, mask=has_pair[:, None] & inside[None, :], other=0.0)
            total = tl.dot(h.to(rows.dtype), rows, total, input_precision="ieee")
        out_at = out_ptr + (offset + ranks)[:, None] * D + columns[None, :]
        tl.store(out_at, total, mask=has_rank[:, None] & inside[None, :])


def block_config(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks of all three for rows of this width and type, and warps."""
    block_d = max(16, min(BLOCK_D, triton.next_power_of_2(width)))
    # Float32 has no tensor cores here: with 4 warps the products take 150 to 190 registers, and spill with Triton 3.9.
    warps = 8 if dtype == torch.float32 else 4
    return {"BLOCK_P": BLOCK_P, "BLOCK_R": BLOCK_R, "BLOCK_D": block_d, "num_warps": warps}


@dataclass(frozen=True, slots=True)
class Tiles:
    """Pairs of one transform each, at most BLOCK_P; a tile without pairs is none."""

    latents_T: torch.Tensor
    firsts_T: torch.Tensor
    lasts_T: torch.Tensor

    @classmethod
    def of(cls, order: PairOrder) -> "Tiles":
        """Those of a batch's sorted pairs."""
        starts_F = order.get().offsets_F
        counts_F = (starts_F.diff() + BLOCK_P - 1) // BLOCK_P
        ends_F = counts_F.cumsum(0)
        most = triton.cdiv(order.indices_NK.numel(), BLOCK_P) + order.num_latents
        tiles_T = torch.arange(most, device=starts_F.device)
        latents_T = torch.searchsorted(ends_F, tiles_T, right=True).clamp_max(order.num_latents - 1)
        first_tiles_T = (ends_F - counts_F)[latents_T]
        firsts_T = starts_F[latents_T] + (tiles_T - first_tiles_T) * BLOCK_P
        lasts_T = torch.minimum(firsts_T + BLOCK_P, starts_F[latents_T + 1])
        return cls(latents_T, firsts_T, lasts_T)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernels take, in their order."""
        return self.latents_T, self.firsts_T, self.lasts_T


def project(rows_ND: torch.Tensor, W_RD: torch.Tensor, order: PairOrder, tiles: Tiles, ranks: Ranks) -> torch.Tensor:
    """``W_i row`` of every sorted pair, float32 [P, H], H the highest rank; 0 beyond a transform's rank."""
    out_PH = torch.zeros(order.indices_NK.numel(), ranks.largest, dtype=torch.float32, device=rows_ND.device)
    config = block_config(rows_ND.shape[1], rows_ND.dtype)
    _project[(len(tiles.firsts_T), triton.cdiv(ranks.largest, config["BLOCK_R"]))](
        rows_ND.contiguous(), order.rows(), *tiles.arguments, ranks.on(rows_ND.device), W_RD, out_PH,
        rows_ND.shape[1], ranks.largest, **config,
    )  # fmt: skip
    return out_PH


def outer(
    h_PH: torch.Tensor, values_P: torch.Tensor, rows_ND: torch.Tensor, order: PairOrder, ranks: Ranks
) -> torch.Tensor:
    """Sums over each transform's pairs of ``value h row^T``, float32 [R, D]."""
    out_RD = torch.empty(ranks.total, rows_ND.shape[1], dtype=torch.float32, device=rows_ND.device)
    config = block_config(rows_ND.shape[1], rows_ND.dtype)
    blocks = (triton.cdiv(ranks.largest, config["BLOCK_R"]), triton.cdiv(rows_ND.shape[1], config["BLOCK_D"]))
    _outer[(order.num_latents, *blocks)](
        h_PH, values_P, order.rows(), order.get().offsets_F, ranks.on(rows_ND.device), rows_ND.contiguous(), out_RD,
        rows_ND.shape[1], ranks.largest, **config,
    )  # fmt: skip
    return out_RD


def forward(
    values_NK: torch.Tensor,
    order: PairOrder,
    x_ND: torch.Tensor,
    V_RD: torch.Tensor,
    U_RE: torch.Tensor,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is decoded [N, E] and V_i x of every pair, both float32."""
    tiles, width, num_pairs = Tiles.of(order), U_RE.shape[1], order.indices_NK.numel()
    h_PH, values_P = project(x_ND, V_RD, order, tiles, ranks), order.sort(values_NK)
    places_NK = torch.where(order.indices_NK < 0, -1, order.unsort(torch.arange(num_pairs, device=x_ND.device)))
    ones_NK = torch.ones(places_NK.shape, dtype=torch.float32, device=x_ND.device)
    y_NE = torch.empty(len(x_ND), width, dtype=torch.float32, device=x_ND.device)
    config = block_config(width, U_RE.dtype)
    for start in range(0, width, COLUMNS):
        columns = min(COLUMNS, width - start)
        part_PC = torch.empty(num_pairs, columns, dtype=torch.float32, device=x_ND.device)
        _expand[(len(tiles.firsts_T), triton.cdiv(columns, config["BLOCK_D"]))](
            h_PH, values_P, *tiles.arguments, ranks.on(x_ND.device), U_RE, part_PC,
            width, ranks.largest, start, columns, **config,
        )  # fmt: skip
        y_NE[:, start : start + columns] = decode(ones_NK, places_NK, part_PC)
        del part_PC  # or two would be alive at a time
    return y_NE, h_PH


def backward(
    grad_NE: torch.Tensor,
    values_NK: torch.Tensor,
    order: PairOrder,
    x_ND: torch.Tensor,
    V_RD: torch.Tensor,
    U_RE: torch.Tensor,
    ranks: Ranks,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the values, of V and of U, float32; `kept` is what ``forward`` gave."""
    values_P = order.sort(values_NK)
    t_PH = project(grad_NE, U_RE, order, Tiles.of(order), ranks)
    dvalues_P = (t_PH * kept).sum(1)
    return (
        order.unsort(dvalues_P),
        outer(t_PH, values_P, x_ND, order, ranks),
        outer(kept, values_P, grad_NE, order, ranks),
    )
