"""``encode_threshold`` on a GPU: matrix product in tiles of columns, and the pairs of each tile that pass, compacted.

Two walks over the tile, which is in cache if it is small: ``_count`` counts per row, a cumulative sum gives each row
its place, ``_emit`` writes (row, latent, value) there. No atomics: pairs come in row order, the same on every run.
Where the pairs of the next tile begin is known on the device alone, so that no tile waits for the host.
"""

import torch
import triton
import triton.language as tl

from shared.kernels.encode_topk.triton import tiles
from shared.kernels.ragged import pad_tiles

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
    count_ptr,
    end_ptr,
    rows_ptr,
    latents_ptr,
    values_ptr,
    capacity,
    num_columns,
    first_row,
    first_column,
    z_stride,
    BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(end_ptr + row) - tl.load(count_ptr + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z, passes = _passing(z_ptr, b_ptr, bar_ptr, row, columns, num_columns, z_stride, BATCH)
        slots = position + tl.cumsum(passes.to(tl.int32)) - 1
        fits = passes & (slots < capacity)
        tl.store(rows_ptr + slots, first_row + row, mask=fits)
        tl.store(latents_ptr + slots, first_column + columns, mask=fits)
        tl.store(values_ptr + slots, z, mask=fits)
        position += tl.sum(passes.to(tl.int32))


class Tile:
    """One tile of pre-activations, ``z_TC + b_C``, and how many of each row's pass the bar of their column.

    Above it; with `batch` also those at it, if they are positive. No host synchronisation.
    """

    def __init__(
        self, rows: slice, columns: slice, z_TC: torch.Tensor, b_F: torch.Tensor, bar_F: torch.Tensor, *, batch: bool
    ) -> None:
        self._first, self._size, self._stride = (rows.start, columns.start), z_TC.shape, z_TC.stride(0)
        self._options = {"BATCH": batch, "BLOCK": BLOCK_COLUMNS}
        self._read = z_TC, b_F[columns].contiguous(), bar_F[columns].float().contiguous()
        self.count_T = torch.empty(z_TC.shape[0], dtype=torch.int64, device=z_TC.device)
        _count[(self._size[0],)](*self._read, self.count_T, self._size[1], self._stride, **self._options)

    def emit(self, end_T: torch.Tensor, rows_P: torch.Tensor, latents_P: torch.Tensor, values_P: torch.Tensor) -> None:
        """Write the pairs, each row's before its `end_T`; those behind the end of the buffers are left out."""
        _emit[(self._size[0],)](
            *self._read, self.count_T, end_T, rows_P, latents_P, values_P, values_P.numel(), self._size[1],
            *self._first, self._stride, **self._options,
        )  # fmt: skip


def collect_above(tile: Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, latents and values of a tile's entries that pass, in row order; waits for the device."""
    end_T = tile.count_T.cumsum(0)
    total = int(end_T[-1])
    rows_P, latents_P = (torch.empty(total, dtype=torch.int64, device=end_T.device) for _ in range(2))
    values_P = torch.empty(total, dtype=torch.float32, device=end_T.device)
    if total:
        tile.emit(end_T, rows_P, latents_P, values_P)
    return rows_P, latents_P, values_P


# Pairs of a row to make room for. Where there turn out to be more, all is done again, and there is room from then on.
PAIRS_PER_ROW = 256
_pairs_per_row: dict[tuple[int, ...], int] = {}


def encode_threshold(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, threshold_F: torch.Tensor, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_threshold.encode_threshold``. Values are float32 whatever the inputs' type.

    Waits for the device twice: for the number of pairs, and for the fullest row.
    """
    num_rows, shape = x_ND.shape[0], tuple(W_FD.shape)
    room = num_rows * _pairs_per_row.get(shape, PAIRS_PER_ROW)
    while True:
        rows_P, latents_P = (torch.empty(room, dtype=torch.int32, device=x_ND.device) for _ in range(2))
        values_P = torch.empty(room, dtype=torch.float32, device=x_ND.device)
        end = torch.zeros(1, dtype=torch.int64, device=x_ND.device)
        for rows, columns, z_TC in tiles(x_ND, W_FD, compute_dtype):
            tile = Tile(rows, columns, z_TC, b_F, threshold_F, batch=False)
            end_T = tile.count_T.cumsum(0).add_(end)
            tile.emit(end_T, rows_P, latents_P, values_P)
            end = end_T[-1:]
        total = int(end)
        if total <= room:
            return pad_tiles(rows_P[:total], latents_P[:total], values_P[:total], num_rows)
        _pairs_per_row[shape] = triton.next_power_of_2(triton.cdiv(total, num_rows))
        room = total
