"""``row_grad`` on a GPU: one program per latent and block of columns walks over the latent's sorted pairs.

Every sum has one owner and one order: no atomics, the same bits on every run. Each turn gathers BLOCK_P rows at once; a
warp owns its columns, so that a turn has no barrier. A latent that fires on very many tokens would make one long walk:
runs of CHUNK pairs that belong to one latent are summed beforehand, each by a program of its own, and the latent's
program reads their sums.

    pairs      | 0 1 2 3 | 4 5 6 7 | 8 9 . . |      CHUNK = 4
    latent f     . . f f   f f f f   f f             walks over 2 3, 8 9 and reads the sum of chunk 1
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.kernels.pairs import PairOrder
from shared.kernels.tuning import tuned

MAX_BLOCK_D = 512
BLOCK_P = 4
SUM_BLOCK_P = 128
CHUNK = 512


@triton.jit
def _walk(
    total,
    coefficients_ptr,
    tokens_ptr,
    rows_ptr,
    first,
    last,
    columns,
    D,
    BLOCK_P: tl.constexpr,
):
    """`total` and the weighted sum of the rows of pairs first to last, in pair order."""
    inside = columns < D
    for start in range(first, last, BLOCK_P):
        pairs = start + tl.arange(0, BLOCK_P)
        present = pairs < last
        tokens = tl.load(tokens_ptr + pairs, mask=present, other=0).to(tl.int64)
        coefficients = tl.load(coefficients_ptr + pairs, mask=present, other=0.0).to(tl.float32)
        both = present[:, None] & inside[None, :]
        rows = tl.load(rows_ptr + tokens[:, None] * D + columns[None, :], mask=both, other=0.0)
        total += tl.sum(coefficients[:, None] * rows.to(tl.float32), axis=0)
    return total


@triton.jit
def sum_pairs(
    coefficients_ptr,
    tokens_ptr,
    offsets_ptr,
    rows_ptr,
    chunks_ptr,
    latent,
    columns,
    D,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns of one latent's gradient: the weighted sum of its pairs' rows, summed chunks first."""
    first = tl.load(offsets_ptr + latent).to(tl.int32)
    last = tl.load(offsets_ptr + latent + 1).to(tl.int32)
    first_chunk, last_chunk = (first + CHUNK - 1) // CHUNK, last // CHUNK
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    pause = last
    if last_chunk > first_chunk:
        pause = first_chunk * CHUNK
        chunks_ptr += first_chunk.to(tl.int64) * D
        for _ in range(first_chunk, last_chunk):
            total += tl.load(chunks_ptr + columns, mask=columns < D, other=0.0)
            chunks_ptr += D
    total = _walk(total, coefficients_ptr, tokens_ptr, rows_ptr, first, pause, columns, D, BLOCK_P)
    if last_chunk > first_chunk:
        resume = last_chunk * CHUNK
        total = _walk(total, coefficients_ptr, tokens_ptr, rows_ptr, resume, last, columns, D, BLOCK_P)
    return total


@triton.jit
def _chunk_sums(
    coefficients_ptr,
    tokens_ptr,
    rows_ptr,
    order_ptr,
    indices_ptr,
    out_ptr,
    D,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    latent = tl.load(indices_ptr + tl.load(order_ptr + first))
    if (latent >= 0) & (latent == tl.load(indices_ptr + tl.load(order_ptr + first + CHUNK - 1))):
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        total = _walk(total, coefficients_ptr, tokens_ptr, rows_ptr, first, first + CHUNK, columns, D, BLOCK_P)
        tl.store(out_ptr + chunk.to(tl.int64) * D + columns, total, mask=columns < D)


@triton.jit
def _row_grad(
    coefficients_ptr,
    tokens_ptr,
    offsets_ptr,
    rows_ptr,
    chunks_ptr,
    out_ptr,
    D,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = sum_pairs(
        coefficients_ptr, tokens_ptr, offsets_ptr, rows_ptr, chunks_ptr, latent, columns, D, CHUNK, BLOCK_P, BLOCK_D
    )
    tl.store(out_ptr + latent * D + columns, total, mask=columns < D)


@triton.jit
def _latent_sum(coefficients_ptr, offsets_ptr, out_ptr, BLOCK_P: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + latent)
    last = tl.load(offsets_ptr + latent + 1)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(first, last, BLOCK_P):
        pairs = start + tl.arange(0, BLOCK_P)
        total += tl.load(coefficients_ptr + pairs, mask=pairs < last, other=0.0).to(tl.float32)
    tl.store(out_ptr + latent, tl.sum(total))


@dataclass(frozen=True, slots=True)
class Walk:
    """What ``sum_pairs`` reads: one term of a gradient."""

    coefficients_P: torch.Tensor
    """In pair order."""
    tokens_P: torch.Tensor
    """int32, in pair order."""
    offsets_F: torch.Tensor
    rows_ND: torch.Tensor
    chunks_CD: torch.Tensor
    """float32; sums of those chunks that belong to one latent. The other rows are never read."""

    @classmethod
    def of(cls, coefficients_NK: torch.Tensor, order: PairOrder, rows_ND: torch.Tensor) -> "Walk":
        """Sorts the coefficients and sums the chunks."""
        pairs, rows_ND, d_model = order.get(), rows_ND.contiguous(), rows_ND.shape[1]
        num_chunks = pairs.order_P.numel() // CHUNK
        chunks_CD = torch.empty(max(1, num_chunks), d_model, dtype=torch.float32, device=rows_ND.device)
        walk = cls(order.sort(coefficients_NK), order.rows(), pairs.offsets_F, rows_ND, chunks_CD)
        if num_chunks:
            config = config_for(d_model)
            indices_P = order.indices_NK.reshape(-1)
            _chunk_sums[(num_chunks, triton.cdiv(d_model, config["BLOCK_D"]))](
                walk.coefficients_P, walk.tokens_P, rows_ND, pairs.order_P, indices_P, chunks_CD, d_model,
                CHUNK=CHUNK, **config,
            )  # fmt: skip
        return walk

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernels take, in their order."""
        return self.coefficients_P, self.tokens_P, self.offsets_F, self.rows_ND, self.chunks_CD


def config_for(d_model: int) -> dict[str, int]:
    """Block sizes and warps of ``_row_grad``: a warp's lanes load 16 bytes each of its own 256 columns in bfloat16."""
    block = min(MAX_BLOCK_D, triton.next_power_of_2(d_model))
    return tuned("row_grad", d_model, {"BLOCK_P": BLOCK_P, "BLOCK_D": block, "num_warps": max(1, block // 256)})


def row_grad(coefficients_NK: torch.Tensor, order: PairOrder, rows_ND: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.row_grad.row_grad``. The result is float32 whatever the inputs' type."""
    num_latents, d_model = order.num_latents, rows_ND.shape[1]
    out_FD = torch.empty(num_latents, d_model, dtype=torch.float32, device=rows_ND.device)
    config = config_for(d_model)
    _row_grad[(num_latents, triton.cdiv(d_model, config["BLOCK_D"]))](
        *Walk.of(coefficients_NK, order, rows_ND).arguments, out_FD, d_model, CHUNK=CHUNK, **config
    )
    return out_FD


def latent_sum(coefficients_NK: torch.Tensor, order: PairOrder) -> torch.Tensor:
    """See ``shared.kernels.row_grad.latent_sum``. The result is float32 whatever the input's type."""
    out_F = torch.empty(order.num_latents, dtype=torch.float32, device=coefficients_NK.device)
    _latent_sum[(order.num_latents,)](order.sort(coefficients_NK), order.get().offsets_F, out_F, BLOCK_P=SUM_BLOCK_P)
    return out_F
