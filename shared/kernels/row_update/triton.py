"""``row_update`` on a GPU: one program per row holds weight, gradient and moments in registers for all four steps."""

import torch
import triton
import triton.language as tl

from shared.kernels.adam_step import AdamStep

# Columns of a program where rows are independent of their length (no projection): a bias, or a plain matrix.
FLAT_BLOCK = 1024


@triton.jit
def _noise(at, step):
    """32 random bits for each offset, by a hash of offset and step (C. Wellons's lowbias32, exhaustively tested)."""
    bits = at.to(tl.uint32) ^ (step.to(tl.uint32) * 0x9E3779B9)
    bits ^= bits >> 16
    bits *= 0x21F0AAAD
    bits ^= bits >> 15
    bits *= 0xD35A2D97
    return bits ^ (bits >> 15)


@triton.jit
def _store_moment(ptr, at, value, noise, inside):
    """Into bfloat16 it is rounded to one of the two nearest, right on average: `noise` are 16 random bits."""
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = (value.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
        rounded = bits.to(tl.float32, bitcast=True)
        value = tl.where(value != value, value, rounded)  # a NaN's bits could run over into a zero's
    tl.store(ptr + at, value, mask=inside)


@triton.jit
def load_state(weight_ptr, first_ptr, second_ptr, at, inside):
    """Weight and both moments in float32."""
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    first = tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return weight, first, second


@triton.jit
def adam_row(
    weight,
    grad,
    first,
    second,
    weight_ptr,
    first_ptr,
    second_ptr,
    at,
    inside,
    lr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    correction1,
    correction2,
    step,
    UNIT_ROWS: tl.constexpr,
):
    """Project the clipped gradient, Adam, renormalise, and store, for the elements at offsets `at`."""
    if UNIT_ROWS:
        grad -= tl.sum(grad * weight) * weight
    first = beta1 * first + rest1 * grad
    second = beta2 * second + rest2 * grad * grad
    weight -= lr * (first / correction1) / (tl.sqrt(second / correction2) + eps)
    if UNIT_ROWS:
        weight /= tl.sqrt(tl.sum(weight * weight))
    noise = _noise(at, step)
    _store_moment(first_ptr, at, first, noise & 0xFFFF, inside)
    _store_moment(second_ptr, at, second, noise >> 16, inside)
    tl.store(weight_ptr + at, weight, mask=inside)


# The step is no reason to compile again: 1 and multiples of 16 would be, as are other integers that kernels take.
@triton.jit(do_not_specialize=["step"])
def _row_update(
    weight_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    clip_ptr,
    lr,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    correction1,
    correction2,
    step,
    D,
    UNIT_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    at = tl.program_id(0).to(tl.int64) * D + columns
    weight, first, second = load_state(weight_ptr, first_ptr, second_ptr, at, inside)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(clip_ptr)
    adam_row(
        weight, grad, first, second, weight_ptr, first_ptr, second_ptr, at, inside,
        lr, beta1, rest1, beta2, rest2, eps, correction1, correction2, step, UNIT_ROWS,
    )  # fmt: skip


def block_d(d_model: int, unit_rows: bool) -> int:
    """Columns of one program: a whole row where rows are projected."""
    block: int = triton.next_power_of_2(d_model)
    return block if unit_rows else min(block, FLAT_BLOCK)


def num_warps_for(block_d: int) -> int:
    """Warps of one program: about 16 columns per thread."""
    return min(16, max(1, block_d // 512))


def row_update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    adam: AdamStep,
) -> None:
    """See ``shared.kernels.row_update.row_update``. Weights are float32; moments float32 or bfloat16."""
    num_rows, d_model = weight.shape
    block = block_d(d_model, adam.unit_rows)
    _row_update[(num_rows, triton.cdiv(d_model, block))](
        weight, grad, first, second, adam.clip, *adam.scalars, d_model,
        UNIT_ROWS=adam.unit_rows, BLOCK_D=block, num_warps=num_warps_for(block),
    )  # fmt: skip
