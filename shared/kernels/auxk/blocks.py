"""``auxk_error`` in blocks of rows: value and gradient in one go, by matrix products over the dead latents' columns.

R is a small part of F and most dead latents are among the num_aux, so dense products on [rows, R] beat gathering pairs.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shared.kernels.auxk.leaky import leaky_, through_leaky_
from shared.kernels.auxk.ranks import DeadRows, LatentRanks
from shared.kernels.linear import linear
from shared.kernels.product import matmul

# Elements of one [rows, R] block; a few such blocks are alive at once.
BLOCK_ELEMENTS = 1 << 24


class _AuxKError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_ND: torch.Tensor,
        centred_ND: torch.Tensor,
        W_enc_RD: torch.Tensor,
        b_enc_R: torch.Tensor,
        W_dec_RD: torch.Tensor,
        num_aux: int,
        ranks: LatentRanks,
        slope: float,
        num_dead: int,
        compute_dtype: str,
    ) -> torch.Tensor:
        num_rows = residual_ND.shape[0]
        dtype = torch.bfloat16 if compute_dtype == "bfloat16" else residual_ND.dtype
        W_enc, W_dec = W_enc_RD.to(dtype), W_dec_RD.to(dtype)
        grads = [torch.zeros_like(weight) for weight in (W_enc_RD, b_enc_R, W_dec_RD)]
        total = residual_ND.new_zeros(())
        rows = max(1, BLOCK_ELEMENTS // max(1, num_dead))  # equally many on all ranks
        for start in range(0, num_rows, rows):
            residual, centred = residual_ND[start : start + rows], centred_ND[start : start + rows].to(dtype)
            z = leaky_(_product(centred, W_enc, b_enc_R), slope)
            if num_dead > num_aux:
                z.masked_fill_(z < ranks.kth_largest(z, num_aux), 0)
            energy = residual.square().sum(1, keepdim=True).clamp_min_(torch.finfo(residual.dtype).tiny)
            error = ranks.sum_forward(_product(z.to(dtype), W_dec.T).to(residual.dtype)).sub_(residual)
            total += (error.square().sum(1, keepdim=True) / energy).sum()
            grad = (error * (2 / num_rows / energy)).to(dtype)
            dz = through_leaky_(_product(grad, W_dec), z, slope)
            # Not `linear`: oneDNN would want copies of both, transposed, which cost more than its faster product saves.
            grads[0] += matmul(dz.to(dtype).T, centred)
            grads[1] += dz.sum(0, dtype=grads[1].dtype)
            grads[2] += matmul(z.to(dtype).T, grad)
        ctx.save_for_backward(*grads)
        return total / num_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dW_enc, db_enc, dW_dec = ctx.saved_tensors
        return None, None, dW_enc * grad, db_enc * grad, dW_dec * grad, None, None, None, None, None


def _product(a_NM: torch.Tensor, W_KM: torch.Tensor, b_K: torch.Tensor | None = None) -> torch.Tensor:
    """``a W^T + b``. A GPU gives the float32 sums of a bfloat16 product; rounded, they would tie at the k-th place."""
    if a_NM.is_cuda and a_NM.dtype == torch.bfloat16:
        z_NK = matmul(a_NM, W_KM.T)
        return z_NK if b_K is None else z_NK.add_(b_K)
    return linear(a_NM, W_KM, None if b_K is None else b_K.to(a_NM.dtype))


def auxk_error(
    residual_ND: torch.Tensor,
    centred_ND: torch.Tensor,
    dead: DeadRows,
    num_aux: int,
    ranks: LatentRanks,
    slope: float,
    compute_dtype: str,
) -> torch.Tensor:
    """See ``shared.kernels.auxk.auxk_error``."""
    result: torch.Tensor = _AuxKError.apply(
        residual_ND, centred_ND, dead.W_enc_RD, dead.b_enc_R, dead.W_dec_RD, num_aux, ranks, slope, dead.count,
        compute_dtype,
    )  # fmt: skip
    return result
