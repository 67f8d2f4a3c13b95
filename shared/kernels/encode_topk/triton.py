"""``encode_topk`` on a GPU: matrix product and exact selection in tiles of columns.

For each tile of latents, the matrix product leaves pre-activations [N, C] in a reused workspace and ``_select`` walks
over them once. A row keeps its candidates in a buffer of packed 64-bit keys, and the value of the k-th best so far as
the bar that a new one must pass; only when the buffer is full is it cut to the k best. The bar rises so quickly that a
row of F random values sees about k ln(F / k) candidates: the walk is one read of the tile.

A key holds the float's bits above and the complemented index below. Positive floats order like their bits, so keys
order by value and, for equal values, lowest index first; no two keys are equal. The k-th largest key is found bit by
bit, by counting: a loop of 63 reductions in place of a sort, whose unrolled code is a hundred times larger.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from shared.kernels.tuning import tuned

# Size of the workspace for one tile of pre-activations: about a GPU's L2, where the selection then finds it.
WORKSPACE_MB = 64
BLOCK_COLUMNS = 1024
SMALLEST_TILE = 1024
RANK_BLOCK = 16


@triton.jit
def _keep_best(buffer_ptr, count, k, CAPACITY: tl.constexpr):
    """Cut the buffer to its k largest keys; returns how many are left and the k-th largest, 0 if there are fewer."""
    slots = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # the buffer is read by other threads than wrote it
    keys = tl.load(buffer_ptr + slots, mask=slots < count, other=0)
    tl.debug_barrier()
    kth = tl.zeros([1], dtype=tl.int64)
    bit = tl.full([1], 1 << 62, dtype=tl.int64)
    for _ in range(63):
        num_above = tl.sum((keys >= kth + bit).to(tl.int32))
        kth += tl.where(num_above >= k, bit, 0)
        bit = bit >> 1
    kept = keys >= tl.maximum(kth, 1)
    tl.store(buffer_ptr + tl.cumsum(kept.to(tl.int32)) - 1, keys, mask=kept)
    tl.debug_barrier()
    return tl.minimum(count, k), tl.sum(kth)


@triton.jit
def _value_of(key):
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _select(
    z_ptr,
    b_ptr,
    keys_ptr,
    count_ptr,
    bar_ptr,
    num_columns,
    first_column,
    z_stride,
    k,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    buffer_ptr = keys_ptr + row * CAPACITY
    count = tl.load(count_ptr + row)
    bar = tl.load(bar_ptr + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
        z += tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        # Not "z > bar": a NaN must survive into the output. An equal value at a higher index never wins.
        passes = inside & ((z > bar) | (z != z))
        num_passes = tl.sum(passes.to(tl.int32))
        if num_passes > 0:
            bits = tl.where(z != z, 0x7FFFFFFF, z.to(tl.int32, bitcast=True))
            low = 0x7FFFFFFF - (first_column + columns)
            keys = (bits.to(tl.int64) << 32) | low.to(tl.int64)
            position = count + tl.cumsum(passes.to(tl.int32)) - 1
            tl.store(buffer_ptr + position, keys, mask=passes)
            count += num_passes
            if count > CAPACITY - BLOCK:
                count, kth = _keep_best(buffer_ptr, count, k, CAPACITY)
                bar = _value_of(kth)
    tl.store(count_ptr + row, count)
    tl.store(bar_ptr + row, bar)


@triton.jit
def _unpack(
    keys_ptr,
    count_ptr,
    values_ptr,
    indices_ptr,
    k,
    CAPACITY: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    buffer_ptr = keys_ptr + row * CAPACITY
    count, _ = _keep_best(buffer_ptr, tl.load(count_ptr + row), k, CAPACITY)
    slots = tl.arange(0, SLOTS)
    keys = tl.load(buffer_ptr + slots, mask=slots < count, other=0)
    # Descending order by counting, for each key, the larger ones. Padding ranks behind, in slot order.
    rank = tl.zeros([SLOTS], dtype=tl.int32)
    for start in range(0, count, RANK_BLOCK):
        others = start + tl.arange(0, RANK_BLOCK)
        rivals = tl.load(buffer_ptr + others, mask=others < count, other=0)
        rank += tl.sum((rivals[None, :] > keys[:, None]).to(tl.int32), axis=1)
    fired = slots < count
    rank = tl.where(fired, rank, slots)
    indices = tl.where(fired, 0x7FFFFFFF - (keys & 0x7FFFFFFF), -1)
    tl.store(values_ptr + row * k + rank, _value_of(keys), mask=slots < k)
    tl.store(indices_ptr + row * k + rank, indices, mask=slots < k)


def config_for(d_model: int) -> dict[str, int]:
    """Size of the workspace, and columns of one step of ``_select``."""
    return tuned("encode_topk", d_model, {"WORKSPACE_MB": WORKSPACE_MB, "BLOCK": BLOCK_COLUMNS})


def capacity_for(k: int, block: int) -> int:
    """Slots of a row's candidate buffer: k survivors and one block of newcomers, a power of two."""
    capacity: int = triton.next_power_of_2(k + block)
    return capacity


def num_warps_for(capacity: int) -> int:
    """Warps of one program: about 16 keys per thread."""
    return min(16, max(4, capacity // 512))


def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``. Values are float32 whatever the inputs' type."""
    num_rows, device = x_ND.shape[0], x_ND.device
    block = config_for(x_ND.shape[1])["BLOCK"]
    capacity = capacity_for(k, block)
    options = {"CAPACITY": capacity, "num_warps": num_warps_for(capacity)}
    keys = torch.empty(num_rows, capacity, dtype=torch.int64, device=device)
    count = torch.zeros(num_rows, dtype=torch.int32, device=device)
    bar = torch.zeros(num_rows, dtype=torch.float32, device=device)
    values_NK = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    indices_NK = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    for columns, z_NC in column_tiles(x_ND, W_FD, compute_dtype):
        width = z_NC.shape[1]
        _select[(num_rows,)](
            z_NC, b_F[columns], keys, count, bar, width, columns.start, width, k, BLOCK=block, **options
        )
    if num_rows:
        _unpack[(num_rows,)](
            keys, count, values_NK, indices_NK, k, SLOTS=triton.next_power_of_2(k), RANK_BLOCK=RANK_BLOCK, **options
        )
    return values_NK, indices_NK


def column_tiles(x_ND: torch.Tensor, W_FD: torch.Tensor, compute_dtype: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """Iterates over (columns, z_NC): a slice of latents and ``x W^T`` [N, C] float32, overwritten by the next one.

    Nothing for no rows. A float32 W is cast to bfloat16 tile by tile, so that no copy of it exists.
    """
    num_rows, num_latents = x_ND.shape[0], W_FD.shape[0]
    if num_rows == 0:
        return
    dtype = torch.bfloat16 if compute_dtype == "bfloat16" else x_ND.dtype
    x_ND = x_ND.to(dtype)
    workspace_bytes = config_for(x_ND.shape[1])["WORKSPACE_MB"] << 20
    tile = min(num_latents, max(SMALLEST_TILE, workspace_bytes // (4 * num_rows) // 128 * 128))
    workspace = torch.empty(num_rows * tile, dtype=torch.float32, device=x_ND.device)
    for start in range(0, num_latents, tile):
        columns = slice(start, min(start + tile, num_latents))
        width = columns.stop - start
        z_NC = workspace[: num_rows * width].view(num_rows, width)
        _matmul_float32(x_ND, W_FD[columns].to(dtype), z_NC)
        yield columns, z_NC


def _matmul_float32(x_ND: torch.Tensor, W_CD: torch.Tensor, out_NC: torch.Tensor) -> None:
    """``x W^T`` accumulated and kept in float32: rounding to bfloat16 would tie the k-th place in half of the rows."""
    if x_ND.dtype == torch.float32 or not x_ND.is_cuda:
        torch.mm(x_ND.float(), W_CD.float().T, out=out_NC)
    else:
        torch.mm(x_ND, W_CD.T, out_dtype=torch.float32, out=out_NC)
