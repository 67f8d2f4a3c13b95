"""``decode`` and ``dot_picks`` on a GPU: one program per token and block, float32 accumulation, no atomics."""

import torch
import triton
import triton.language as tl

from shared.kernels.tuning import tuned

MAX_BLOCK_D = 1024
BLOCK_K = 8


@triton.jit
def _decode(values_ptr, indices_ptr, W_ptr, out_ptr, K, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for pick in range(0, K):
        index = tl.load(indices_ptr + row * K + pick)
        if index >= 0:
            value = tl.load(values_ptr + row * K + pick).to(tl.float32)
            total += value * tl.load(W_ptr + index * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + columns, total, mask=inside)


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


def decode_config(d_model: int) -> dict[str, int]:
    """Columns and warps of one program of ``_decode``."""
    block = min(MAX_BLOCK_D, triton.next_power_of_2(d_model))
    return tuned("decode", d_model, {"BLOCK_D": block, "num_warps": 4})


def dot_config(d_model: int) -> dict[str, int]:
    """Picks, columns per turn and warps of one program of ``_dot_picks``, and its columns in all, a multiple of those.

    With all columns in one program rows are read whole. With few, the same columns of all of W stay in L2 between one
    row's picks and another's, for a sum over the parts.
    """
    block = min(MAX_BLOCK_D, triton.next_power_of_2(d_model))
    whole = triton.cdiv(d_model, block) * block
    return tuned("dot_picks", d_model, {"BLOCK_D": block, "BLOCK_K": BLOCK_K, "PART_D": whole, "num_warps": 4})


def decode(values_NK: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.decode``. The result is float32 whatever the inputs' type."""
    (num_rows, num_picks), d_model = indices_NK.shape, W_FD.shape[1]
    out_ND = torch.empty(num_rows, d_model, dtype=torch.float32, device=W_FD.device)
    config = decode_config(d_model)
    if num_rows:
        _decode[(num_rows, triton.cdiv(d_model, config["BLOCK_D"]))](
            values_NK.contiguous(), indices_NK.contiguous(), W_FD, out_ND, num_picks, d_model, **config
        )
    return out_ND


def dot_picks(grad_ND: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.dot_picks``. The result is float32 whatever the inputs' type."""
    (num_rows, num_picks), d_model = indices_NK.shape, W_FD.shape[1]
    config = dot_config(d_model)
    num_parts = triton.cdiv(d_model, config["PART_D"])
    out_SNK = torch.empty(num_parts, num_rows, num_picks, dtype=torch.float32, device=W_FD.device)
    if num_rows:
        _dot_picks[(num_rows, triton.cdiv(num_picks, config["BLOCK_K"]), num_parts)](
            grad_ND.contiguous(), indices_NK.contiguous(), W_FD, out_SNK, num_picks, d_model, **config
        )
    return out_SNK[0] if num_parts == 1 else out_SNK.sum(0)
