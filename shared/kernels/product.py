"""Dense matrix products of the activations that train densely, in the type that ``compute.dtype`` asks for."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shared.kernels.compute import AUTO, Compute


def product(
    a_NM: torch.Tensor, b_MK: torch.Tensor, bias_K: torch.Tensor | None = None, *, compute: Compute = AUTO
) -> torch.Tensor:
    """``a b + bias`` [N, K], in the type of the inputs, with every gradient.

    compute.dtype bfloat16 rounds the operands of this product and of its gradients' to bfloat16. On a GPU sums and
    results are float32; a CPU rounds results to bfloat16 too. The bias is added, and its gradient summed, in float32.
    """
    if compute.dtype_for(a_NM) == "bfloat16":
        result: torch.Tensor = _Bfloat16Product.apply(a_NM, b_MK)
        return result if bias_K is None else result + bias_K
    return a_NM @ b_MK if bias_K is None else torch.addmm(bias_K, a_NM, b_MK)


class _Bfloat16Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_NM: torch.Tensor, b_MK: torch.Tensor) -> torch.Tensor:
        a, b = a_NM.bfloat16(), b_MK.bfloat16()
        ctx.save_for_backward(a, b)
        ctx.dtype = a_NM.dtype
        return matmul(a, b).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad_NK.bfloat16()
        need_a, need_b = ctx.needs_input_grad
        return (
            matmul(grad, b.T).to(ctx.dtype) if need_a else None,
            matmul(a.T, grad).to(ctx.dtype) if need_b else None,
        )


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product of matrices: of bfloat16 ones float32 on a GPU, which sums in it anyway; a CPU has no such product."""
    is_rounded = a.is_cuda and a.dtype == torch.bfloat16
    return torch.mm(a, b, out_dtype=torch.float32) if is_rounded else a @ b
