"""``decode`` and ``dot_picks`` on a GPU: one program per token and block, float32 accumulation, no atomics.

``residual`` is ``decode`` that goes on in registers to what is left over and its squares; ``residual_grad`` turns what
is left over into the gradient of its squares. Of [N, D] float32 tensors they move 14 bytes per element; by torch's own
operations, with the gradient of the bias and a metric beside the loss, it is more than 80.
"""

import torch
import triton
import triton.language as tl

from shared.kernels.tuning import tuned

MAX_BLOCK_D = 512
BLOCK_K = 32
# Columns of one program of ``_dot_picks``, whose programs run column block after column block: 64 of 131,072 rows in
# bfloat16 are 17 MB, and most gathers then come from an H100's L2 (measured: 0.9 ms, 1.66 for whole rows).
PART_D = 64
# Rows of one launch of ``_dot_picks``, which bounds the memory of the parts' sums.
DOT_ROWS = 8192
# Rows of one program of ``_residual_grad``.
GRAD_ROWS = 64


@triton.jit
def _weighted_rows(values_ptr, indices_ptr, W_ptr, row, columns, K, D, BLOCK_D: tl.constexpr):
    """Columns of one token's decoding."""
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for pick in range(0, K):
        index = tl.load(indices_ptr + row * K + pick)
        if index >= 0:
            value = tl.load(values_ptr + row * K + pick).to(tl.float32)
            total += value * tl.load(W_ptr + index * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    return total


@triton.jit
def _decode(values_ptr, indices_ptr, W_ptr, out_ptr, K, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = _weighted_rows(values_ptr, indices_ptr, W_ptr, row, columns, K, D, BLOCK_D)
    tl.store(out_ptr + row * D + columns, total, mask=columns < D)


@triton.jit
def _residual(
    values_ptr,
    indices_ptr,
    W_ptr,
    target_ptr,
    b_ptr,
    weight_ptr,
    metric_ptr,
    out_ptr,
    sums_ptr,
    K,
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    decoded = _weighted_rows(values_ptr, indices_ptr, W_ptr, row, columns, K, D, BLOCK_D)
    target = tl.load(target_ptr + row * D + columns, mask=inside, other=0.0)
    left = target - (decoded + tl.load(b_ptr + columns, mask=inside, other=0.0))
    tl.store(out_ptr + row * D + columns, left, mask=inside)
    square = left * left
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + row
    tl.store(sums_ptr + at, tl.sum(square * tl.load(weight_ptr + columns, mask=inside, other=0.0)))
    at += tl.num_programs(0) * tl.num_programs(1).to(tl.int64)
    tl.store(sums_ptr + at, tl.sum(square * tl.load(metric_ptr + columns, mask=inside, other=0.0)))


@triton.jit
def _residual_grad(left_ptr, weight_ptr, scale_ptr, out_ptr, sums_ptr, N, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    factor = tl.load(scale_ptr) * tl.load(weight_ptr + columns, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    first = part * ROWS
    for row in range(first, tl.minimum(first + ROWS, N)):
        at = tl.cast(row, tl.int64) * D + columns
        grad = factor * tl.load(left_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, grad, mask=inside)
        total += grad
    tl.store(sums_ptr + part.to(tl.int64) * D + columns, total, mask=inside)


@triton.jit
def _dot_picks(
    grad_ptr,
    indices_ptr,
    W_ptr,
    out_ptr,
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    picks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(2)
    indices = tl.load(indices_ptr + row * K + picks, mask=picks < K, other=-1)
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, PART_D, BLOCK_D):
        columns = part * PART_D + start + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        present = (indices >= 0)[:, None] & (columns < D)[None, :]
        rows = tl.load(W_ptr + indices[:, None] * D + columns[None, :], mask=present, other=0.0).to(tl.float32)
        total += tl.sum(rows * grad[None, :], axis=1)
    at = (part.to(tl.int64) * tl.num_programs(0) + row) * K + picks
    tl.store(out_ptr + at, total, mask=picks < K)


def decode_config(d_model: int, num_pairs: int | None = None) -> dict[str, int]:
    """Columns and warps of one program of ``_decode``."""
    block = min(MAX_BLOCK_D, triton.next_power_of_2(d_model))
    return tuned("decode", d_model, {"BLOCK_D": block, "num_warps": 1}, num_pairs=num_pairs)


def dot_config(d_model: int, num_pairs: int | None = None) -> dict[str, int]:
    """Picks, columns per turn and warps of one program of ``_dot_picks``, and its columns in all, a multiple of those.

    With all columns in one program rows are read whole. With few, the same columns of all of W stay in L2 between one
    row's picks and another's, for a sum over the parts.
    """
    block = min(PART_D, triton.next_power_of_2(d_model))
    default = {"BLOCK_D": block, "BLOCK_K": BLOCK_K, "PART_D": block, "num_warps": 1}
    return tuned("dot_picks", d_model, default, num_pairs=num_pairs)


def decode(values_NK: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.decode``. The result is float32 whatever the inputs' type."""
    (num_rows, num_picks), d_model = indices_NK.shape, W_FD.shape[1]
    out_ND = torch.empty(num_rows, d_model, dtype=torch.float32, device=W_FD.device)
    config = decode_config(d_model, indices_NK.numel())
    if num_rows:
        _decode[(num_rows, triton.cdiv(d_model, config["BLOCK_D"]))](
            values_NK.contiguous(), indices_NK.contiguous(), W_FD, out_ND, num_picks, d_model, **config
        )
    return out_ND


def residual(
    values_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    W_FD: torch.Tensor,
    target_ND: torch.Tensor,
    b_D: torch.Tensor,
    weight_D: torch.Tensor,
    metric_D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``r = target - (decode + b)`` [N, D] in float32, and [2]: ``mean_n sum_d weight r^2``, and so with the metric."""
    (num_rows, num_picks), d_model = indices_NK.shape, W_FD.shape[1]
    config = decode_config(d_model, indices_NK.numel())
    num_blocks = triton.cdiv(d_model, config["BLOCK_D"])
    out_ND = torch.empty(num_rows, d_model, dtype=torch.float32, device=W_FD.device)
    sums_2BN = torch.empty(2, num_blocks, num_rows, dtype=torch.float32, device=W_FD.device)
    _residual[(num_rows, num_blocks)](
        values_NK.contiguous(), indices_NK.contiguous(), W_FD, target_ND.contiguous(), b_D,
        weight_D.contiguous(), metric_D.contiguous(), out_ND, sums_2BN, num_picks, d_model, **config,
    )  # fmt: skip
    return out_ND, sums_2BN.sum(1).mean(1)


def residual_grad(
    left_ND: torch.Tensor, weight_D: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``mean_n sum_d weight r^2``: for what was decoded [N, D] in `dtype`, and b [D] in float32."""
    num_rows, d_model = left_ND.shape
    num_parts = triton.cdiv(num_rows, GRAD_ROWS)
    grad_ND = torch.empty(num_rows, d_model, dtype=dtype, device=left_ND.device)
    sums_PD = torch.empty(num_parts, d_model, dtype=torch.float32, device=left_ND.device)
    block = min(512, triton.next_power_of_2(d_model))
    _residual_grad[(num_parts, triton.cdiv(d_model, block))](
        left_ND, weight_D.contiguous(), upstream * (-2 / num_rows), grad_ND, sums_PD, num_rows, d_model,
        ROWS=GRAD_ROWS, BLOCK_D=block,
    )  # fmt: skip
    return grad_ND, sums_PD.sum(0)


def dot_picks(grad_ND: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.dot_picks``. The result is float32 whatever the inputs' type."""
    (num_rows, num_picks), d_model = indices_NK.shape, W_FD.shape[1]
    config = dot_config(d_model, indices_NK.numel())
    num_parts = triton.cdiv(d_model, config["PART_D"])
    out_NK = torch.empty(num_rows, num_picks, dtype=torch.float32, device=W_FD.device)
    grad_ND, indices_NK = grad_ND.contiguous(), indices_NK.contiguous()
    for start in range(0, num_rows, DOT_ROWS):
        rows = slice(start, start + DOT_ROWS)
        indices_RK = indices_NK[rows]
        parts_SRK = torch.empty(num_parts, *indices_RK.shape, dtype=torch.float32, device=W_FD.device)
        _dot_picks[(len(indices_RK), triton.cdiv(num_picks, config["BLOCK_K"]), num_parts)](
            grad_ND[rows], indices_RK, W_FD, parts_SRK, num_picks, d_model, **config
        )
        torch.sum(parts_SRK, 0, out=out_NK[rows])
        del parts_SRK  # or two would be alive at a time
    return out_NK
