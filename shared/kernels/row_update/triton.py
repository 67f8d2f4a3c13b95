"""``row_update`` on a GPU: one program per row holds weight, gradient and moments in registers for all four steps."""

import torch
import triton
import triton.language as tl

from shared.kernels.adam_step import AdamStep

# Columns of a program where rows are independent of their length (no projection): a bias, or a plain matrix.
FLAT_BLOCK = 1024


@triton.jit
def adam_row(
    weight_ptr,
    grad,
    first_ptr,
    second_ptr,
    at,
    inside,
    lr,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    UNIT_ROWS: tl.constexpr,
):
    """Project the clipped gradient, Adam, renormalise, for the elements at offsets `at`."""
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if UNIT_ROWS:
        grad -= tl.sum(grad * weight) * weight
    first = beta1 * tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32) + (1 - beta1) * grad
    second = beta2 * tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32) + (1 - beta2) * grad * grad
    weight -= lr * (first / correction1) / (tl.sqrt(second / correction2) + eps)
    if UNIT_ROWS:
        weight /= tl.sqrt(tl.sum(weight * weight))
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    tl.store(weight_ptr + at, weight, mask=inside)


@triton.jit
def _row_update(
    weight_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    clip_ptr,
    lr,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    D,
    UNIT_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    at = tl.program_id(0).to(tl.int64) * D + columns
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(clip_ptr)
    adam_row(
        weight_ptr, grad, first_ptr, second_ptr, at, inside, lr, beta1, beta2, eps, correction1, correction2, UNIT_ROWS
    )


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
    """See ``shared.kernels.row_update.row_update``. Weights are float32; moments may be bfloat16."""
    num_rows, d_model = weight.shape
    block = block_d(d_model, adam.unit_rows)
    _row_update[(num_rows, triton.cdiv(d_model, block))](
        weight, grad, first, second, adam.clip, adam.lr, *adam.betas, adam.eps, *adam.corrections, d_model,
        UNIT_ROWS=adam.unit_rows, BLOCK_D=block, num_warps=num_warps_for(block),
    )  # fmt: skip
