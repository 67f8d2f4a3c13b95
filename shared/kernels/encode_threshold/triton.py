"""``encode_threshold`` on a GPU: matrix product in tiles of columns, and the pairs of each tile that pass, compacted.

Two walks over the tile, which is in cache if it is small: ``_count`` counts per row, a cumulative sum gives each row
its place, ``_emit`` writes (row, latent, value) there. No atomics: pairs come in row order, the same on every run.
"""

import torch
import triton
import triton.language as tl

from shared.kernels.encode_topk.triton import column_tiles
from shared.kernels.ragged import pad_rows

BLOCK_COLUMNS = 1024


@triton.jit
def _passing(z_ptr, b_ptr, bar_ptr, row, columns, num_columns, z_stride, BATCH: tl.constexpr):
    inside = columns < num_columns
    z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0)
    z += tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bar = tl.load(bar_ptr + columns, mask=inside, other=0.0)
    if BATCH:
        passes = (z > 0) & (z >= bar)
    else:
        passes = z > bar
    return z, inside & (passes | (z != z))  # a NaN must survive into the output


@triton.jit
def _count(z_ptr, b_ptr, bar_ptr, count_ptr, num_columns, z_stride, BATCH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _z, passes = _passing(z_ptr, b_ptr, bar_ptr, row, columns, num_columns, z_stride, BATCH)
        count += passes.to(tl.int32)
    tl.store(count_ptr + row, tl.sum(count).to(tl.int64))


@triton.jit
def _emit(
    z_ptr,
    b_ptr,
    bar_ptr,
    end_ptr,
    rows_ptr,
    latents_ptr,
    values_ptr,
    num_columns,
    first_column,
    z_stride,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(end_ptr + row - 1, mask=row > 0, other=0)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, passes = _passing(z_ptr, b_ptr, bar_ptr, row, columns, num_columns, z_stride, BATCH)
        slots = position + tl.cumsum(passes.to(tl.int32)) - 1
        tl.store(rows_ptr + slots, row, mask=passes)
        tl.store(latents_ptr + slots, (first_column + columns).to(tl.int64), mask=passes)
        tl.store(values_ptr + slots, z, mask=passes)
        position += tl.sum(passes.to(tl.int32))


def collect_above(
    z_NC: torch.Tensor, b_C: torch.Tensor, bar_C: torch.Tensor, first_column: int, *, batch: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, latents and values of the entries of ``z_NC + b_C`` that pass, in row order; waits for the device.

    Above the bar of their column; with `batch` also those at it, if they are positive.
    """
    num_rows, num_columns = z_NC.shape
    count_N = torch.empty(num_rows, dtype=torch.int64, device=z_NC.device)
    tile = (z_NC, b_C.contiguous(), bar_C.float().contiguous())
    options = {"BATCH": batch, "BLOCK": BLOCK_COLUMNS}
    _count[(num_rows,)](*tile, count_N, num_columns, z_NC.stride(0), **options)
    end_N = count_N.cumsum(0)
    total = int(end_N[-1])
    rows_P, latents_P = (torch.empty(total, dtype=torch.int64, device=z_NC.device) for _ in range(2))
    values_P = torch.empty(total, dtype=torch.float32, device=z_NC.device)
    if total:
        _emit[(num_rows,)](
            *tile, end_N, rows_P, latents_P, values_P, num_columns, first_column, z_NC.stride(0), **options
        )
    return rows_P, latents_P, values_P


def encode_threshold(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, threshold_F: torch.Tensor, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_threshold.encode_threshold``. Values are float32 whatever the inputs' type."""
    nothing = torch.zeros(0, dtype=torch.int64, device=x_ND.device)
    parts = [(nothing, nothing, nothing.float())]
    for columns, z_NC in column_tiles(x_ND, W_FD, compute_dtype):
        parts.append(collect_above(z_NC, b_F[columns], threshold_F[columns], columns.start, batch=False))
    rows_P, latents_P, values_P = (torch.cat(part) for part in zip(*parts, strict=True))
    return pad_rows(rows_P, latents_P, values_P, x_ND.shape[0])
