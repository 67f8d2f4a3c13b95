"""A decoder of low-rank maps: what a pick adds is its value times a transform of what was read, not a row of a matrix.

    y_n = sum_j values[n, j] U_i V_i x_n,   i = indices[n, j]

The factors of all transforms lie below one another, as rows: V [R, D], and U, transposed, [R, E]. Transform i has rows
``ranks.offsets[i] : ranks.offsets[i + 1]`` of both. The pairs of a transform share one small product, so that a step
costs the ranks of what fires and no [E, D] matrix is ever made. With g the gradient of y, h = V_i x and t = U_i^T g,

    dvalue = t . h;   dU_i = sum value g h^T;   dV_i = sum value t x^T

Shapes: N rows, K picks per row, P pairs, F transforms, R sum of their ranks, D and E widths read and written.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shared.kernels.compute import AUTO, Compute
from shared.kernels.dispatch import implementation, resolve
from shared.kernels.pairs import PairOrder
from shared.kernels.transform_decode.ranks import Ranks


class _TransformDecode(torch.autograd.Function):
    """Value and gradients, pair by pair."""

    @staticmethod
    def forward(
        ctx: Any,
        values_NK: torch.Tensor,
        x_ND: torch.Tensor,
        V_RD: torch.Tensor,
        U_RE: torch.Tensor,
        order: PairOrder,
        ranks: Ranks,
        compute: Compute,
    ) -> torch.Tensor:
        op = implementation("transform_decode", compute.kernels, x_ND)
        inputs = tuple(rounded(tensor, compute) for tensor in (x_ND, V_RD, U_RE))
        y_NE, kept = op.forward(values_NK, order, *inputs, ranks)
        ctx.save_for_backward(values_NK, *inputs, kept)
        ctx.order, ctx.ranks, ctx.compute = order, ranks, compute
        result: torch.Tensor = y_NE
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values_NK, x_ND, V_RD, U_RE, kept = ctx.saved_tensors
        op = implementation("transform_decode", ctx.compute.kernels, x_ND)
        grad_NE = rounded(grad_NE.contiguous(), ctx.compute)
        found = op.backward(grad_NE, values_NK, ctx.order, x_ND, V_RD, U_RE, ctx.ranks, kept)
        dvalues_NK, dV_RD, dU_RE = found
        return dvalues_NK, None, dV_RD, dU_RE, None, None, None


def rounded(tensor: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Operands of the products, in half the bytes where that was asked for: a GPU's sums over them stay in float32."""
    halves = compute.dtype_for(tensor) == "bfloat16" and resolve(compute.kernels, tensor) == "triton"
    return tensor.bfloat16() if halves else tensor


def transform_decode(
    values_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    x_ND: torch.Tensor,
    V_RD: torch.Tensor,
    U_RE: torch.Tensor,
    order: PairOrder,
    ranks: Ranks,
    *,
    compute: Compute = AUTO,
) -> torch.Tensor:
    """The sum above, [N, E], with gradients for the values, V and U; x is taken as a constant.

    values [N, K], x, V and U of one floating type; indices int64 [N, K] distinct within a row, -1 is padding, `order`
    their sorted pairs. Every sum has one fixed order: the same bits on every run. compute.dtype bfloat16 (triton only)
    rounds x, V, U and the output's gradient.
    """
    if resolve(compute.kernels, x_ND) == "reference":
        from shared.kernels.transform_decode import reference

        return reference.transform_decode(values_NK, indices_NK, x_ND.detach(), V_RD, U_RE, ranks)
    result: torch.Tensor = _TransformDecode.apply(values_NK, x_ND.detach(), V_RD, U_RE, order, ranks, compute)
    return result


__all__ = ["Ranks", "transform_decode"]
