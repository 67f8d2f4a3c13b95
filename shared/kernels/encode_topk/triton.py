"""``encode_topk`` on a GPU: matrix product and exact selection in tiles of columns.

For each tile of latents, the matrix product leaves pre-activations [N, C] in a reused workspace and ``_select`` walks
over them once. A row keeps its candidates in a buffer of packed 64-bit keys, and the value of the k-th best so far as
the bar that a new one must pass; only when the buffer is full is it cut to the k best. The bar rises so quickly that a
row of F random values sees about k ln(F / k) candidates: the walk is one read of the tile.

A key holds the float's bits above and the complemented index below. Positive floats order like their bits, so keys
order by value and, for equal values, lowest index first; no two keys are equal. The k-th largest is found bit by bit,
by counting: a loop of 31 reductions over the values, and as many over the indices only where values tie for the last
places. A sort's unrolled code would be a hundred times larger.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from shared.kernels.tuning import tuned

# Size of the workspace for one tile of pre-activations. On an H100 (50 MB of L2) 7 % of a tile of 32 MB was still in L2
# when it was selected from: what passes through for the product drives it out. Larger tiles need fewer launches.
WORKSPACE_MB = 128
# Rows of one tile. More rows would make it narrow, and x is read once per tile of columns.
TILE_ROWS = 16384
SMALLEST_TILE = 1024
# Columns that a warp looks at in one turn: 32 lanes with two loads of 16 bytes.
BLOCK_COLUMNS = 256
RANK_BLOCK = 16


@triton.jit
def _keep_best(buffer_ptr, count, k, CAPACITY: tl.constexpr):
    """Cut the buffer to its k largest keys; returns how many are left and the k-th value's bits, 0 for fewer than k."""
    slots = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # the buffer is read by other threads than wrote it
    keys = tl.load(buffer_ptr + slots, mask=slots < count, other=0)
    tl.debug_barrier()
    high, low = (keys >> 32).to(tl.int32), keys.to(tl.int32)
    kth = tl.zeros([1], dtype=tl.int32)
    bit = tl.full([1], 1 << 30, dtype=tl.int32)
    for _ in range(31):
        num_reach = tl.sum((high >= kth + bit).to(tl.int32))
        kth += tl.where(num_reach >= k, bit, 0)
        bit = bit >> 1
    above, tied = high > kth, (high == kth) & (kth > 0)
    room = k - tl.sum(above.to(tl.int32))
    least = tl.zeros([1], dtype=tl.int32)
    if tl.sum(tied.to(tl.int32)) > room:  # ties for the last places: the same search among the indices
        bit = tl.full([1], 1 << 30, dtype=tl.int32)
        for _ in range(31):
            num_reach = tl.sum((tied & (low >= least + bit)).to(tl.int32))
            least += tl.where(num_reach >= room, bit, 0)
            bit = bit >> 1
    kept = above | (tied & (low >= least))
    tl.store(buffer_ptr + tl.cumsum(kept.to(tl.int32)) - 1, keys, mask=kept)
    tl.debug_barrier()
    return tl.minimum(count, k), tl.sum(kth)


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
    z_ptr += row * z_stride
    columns = tl.arange(0, BLOCK)
    ahead = tl.load(z_ptr + columns, mask=columns < num_columns, other=0.0)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = ahead + tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        # The next block is on its way while this one is looked at.
        ahead = tl.load(z_ptr + columns + BLOCK, mask=columns + BLOCK < num_columns, other=0.0)
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
                bar = kth.to(tl.float32, bitcast=True)
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
    tl.store(values_ptr + row * k + rank, (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=slots < k)
    tl.store(indices_ptr + row * k + rank, indices, mask=slots < k)


def config_for(d_model: int) -> dict[str, int]:
    """Size of the workspace, and columns of one turn of a warp of ``_select``."""
    return tuned("encode_topk", d_model, {"WORKSPACE_MB": WORKSPACE_MB, "BLOCK": BLOCK_COLUMNS})


def select_config(k: int, warp_columns: int) -> dict[str, int]:
    """Choose for ``_select``: slots of a row's candidate buffer, warps at 16 keys per thread, columns of one turn.

    For up to 128 picks a row is one warp's, and a turn has no barrier. A buffer of at least 2 k + 1 turn is cut when it
    is full: cutting earlier keeps the bar fresher, but costs more than it saves (measured on an H100 at k 64 and 128).
    """
    capacity: int = triton.next_power_of_2(2 * k + warp_columns)
    num_warps = min(16, max(1, capacity // 512))
    config = {"CAPACITY": capacity, "BLOCK": warp_columns * min(4, num_warps), "num_warps": num_warps}
    return config | {"maxnreg": 80} if num_warps == 1 else config  # 25 rows at once on a multiprocessor, not 18


def unpack_config(k: int, config: dict[str, int]) -> dict[str, int]:
    """Choose for ``_unpack``, which reads the buffers of ``_select``."""
    slots: int = triton.next_power_of_2(k)
    warps = max(4, config["num_warps"])
    return {"CAPACITY": config["CAPACITY"], "SLOTS": slots, "RANK_BLOCK": RANK_BLOCK, "num_warps": warps}


def encode_topk(
    x_ND: torch.Tensor, W_FD: torch.Tensor, b_F: torch.Tensor, k: int, compute_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``shared.kernels.encode_topk.encode_topk``. Values are float32 whatever the inputs' type."""
    num_rows, device = x_ND.shape[0], x_ND.device
    config = select_config(k, config_for(x_ND.shape[1])["BLOCK"])
    keys = torch.empty(num_rows, config["CAPACITY"], dtype=torch.int64, device=device)
    count = torch.zeros(num_rows, dtype=torch.int32, device=device)
    bar = torch.zeros(num_rows, dtype=torch.float32, device=device)
    values_NK = torch.empty(num_rows, k, dtype=torch.float32, device=device)
    indices_NK = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    for rows, columns, z_TC in tiles(x_ND, W_FD, compute_dtype):
        state = keys[rows], count[rows], bar[rows]
        width = z_TC.shape[1]
        _select[(len(z_TC),)](z_TC, b_F[columns], *state, width, columns.start, width, k, **config)
    if num_rows:
        _unpack[(num_rows,)](keys, count, values_NK, indices_NK, k, **unpack_config(k, config))
    return values_NK, indices_NK


def tiles(x_ND: torch.Tensor, W_FD: torch.Tensor, compute_dtype: str) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Iterates over (rows, columns, z_TC): slices, and their part of ``x W^T`` in float32, overwritten by the next one.

    Tiles of rows within tiles of columns; nothing for no rows. A float32 W is cast to bfloat16 tile by tile, so that no
    copy of it exists.
    """
    (num_rows, d_model), num_latents = x_ND.shape, W_FD.shape[0]
    if num_rows == 0:
        return
    dtype = torch.bfloat16 if compute_dtype == "bfloat16" else x_ND.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.float32  # nothing here is more exact
    x_ND = x_ND.to(dtype)
    tile_rows = triton.cdiv(num_rows, triton.cdiv(num_rows, TILE_ROWS))
    workspace_bytes = config_for(d_model)["WORKSPACE_MB"] << 20
    tile = min(num_latents, max(SMALLEST_TILE, workspace_bytes // (4 * tile_rows) // 128 * 128))
    workspace = torch.empty(tile_rows * tile, dtype=torch.float32, device=x_ND.device)
    for columns in spans(num_latents, tile):
        W_CD = W_FD[columns].to(dtype)
        for rows in spans(num_rows, tile_rows):
            shape = rows.stop - rows.start, columns.stop - columns.start
            z_TC = workspace[: shape[0] * shape[1]].view(shape)
            _matmul_float32(x_ND[rows], W_CD, z_TC)
            yield rows, columns, z_TC


def spans(count: int, size: int) -> list[slice]:
    """`count` rows or columns in tiles of `size`, the last maybe smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _matmul_float32(x_ND: torch.Tensor, W_CD: torch.Tensor, out_NC: torch.Tensor) -> None:
    """``x W^T`` accumulated and kept in float32: rounding to bfloat16 would tie the k-th place in half of the rows."""
    if x_ND.dtype == torch.float32 or not x_ND.is_cuda:
        torch.mm(x_ND.float(), W_CD.float().T, out=out_NC)
    else:
        torch.mm(x_ND, W_CD.T, out_dtype=torch.float32, out=out_NC)
