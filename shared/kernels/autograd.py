"""The encoder and the decoder as differentiable functions whose backward costs N x K, not N x F.

Shapes: N rows, D d_model, F latents, K picks per row.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shared.kernels.compute import AUTO, Compute
from shared.kernels.decode import decode as decode_forward
from shared.kernels.decode import dot_picks
from shared.kernels.dispatch import resolve
from shared.kernels.pair_update import PairGradient
from shared.kernels.pairs import PairOrder
from shared.kernels.row_grad import latent_sum, row_grad


class _PickedPreactivations(torch.autograd.Function):
    """z at the picks, which the selection has already computed; backward spreads dz over the picked rows only."""

    @staticmethod
    def forward(
        ctx: Any,
        centred_ND: torch.Tensor,
        b_pre_D: torch.Tensor | None,
        W_enc_FD: torch.Tensor,
        b_enc_F: torch.Tensor,
        values_NK: torch.Tensor,
        indices_NK: torch.Tensor,
        order: PairOrder,
        compute: Compute,
        sink: PairGradient | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(_rounded(centred_ND, compute), W_enc_FD, indices_NK)
        ctx.order, ctx.kernels, ctx.sink = order, compute.kernels, sink
        return values_NK.view_as(values_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centred_ND, W_enc_FD, indices_NK = ctx.saved_tensors
        num_latents, options = W_enc_FD.shape[0], {"kernels": ctx.kernels}
        need_x, need_pre, need_W, need_b = ctx.needs_input_grad[:4]
        dx_ND = decode_forward(dz_NK, indices_NK, W_enc_FD, **options) if need_x else None
        dW_FD = None
        if need_W and ctx.sink is not None:
            ctx.sink.add(dz_NK, indices_NK, ctx.order, centred_ND)
        elif need_W:
            dW_FD = row_grad(dz_NK, indices_NK, centred_ND, num_latents, ctx.order, **options)
        db_F = db_pre_D = None
        if need_b or need_pre:
            db_F = latent_sum(dz_NK, indices_NK, num_latents, ctx.order, **options)
        if need_pre:
            # -sum_n dx[n] without the [N, D] gradient: sum the picks per latent first.
            db_pre_D = -(db_F @ W_enc_FD)
        return dx_ND, db_pre_D, dW_FD, db_F if need_b else None, None, None, None, None, None


class _SparseDecode(torch.autograd.Function):
    """Weighted sum of the picked rows."""

    @staticmethod
    def forward(
        ctx: Any,
        values_NK: torch.Tensor,
        indices_NK: torch.Tensor,
        W_dec_FD: torch.Tensor,
        order: PairOrder,
        compute: Compute,
        sink: PairGradient | None,
    ) -> torch.Tensor:
        W_dec_FD = _rounded_if_read_often(W_dec_FD, values_NK, compute)
        ctx.save_for_backward(values_NK, indices_NK, W_dec_FD)
        ctx.order, ctx.compute, ctx.sink = order, compute, sink
        return decode_forward(values_NK, indices_NK, W_dec_FD, kernels=compute.kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values_NK, indices_NK, W_dec_FD = ctx.saved_tensors
        grad_ND = _rounded(grad_ND.contiguous(), ctx.compute)
        dv_NK, dW_FD = _decoder_gradients(ctx, values_NK, indices_NK, W_dec_FD, grad_ND)
        return dv_NK, None, dW_FD, None, None, None


class _SparseReconstruction(torch.autograd.Function):
    """``sparse_decode`` and the loss of what it leaves over in one: a GPU makes both in registers."""

    @staticmethod
    def forward(
        ctx: Any,
        values_NK: torch.Tensor,
        indices_NK: torch.Tensor,
        W_dec_FD: torch.Tensor,
        b_D: torch.Tensor,
        target_ND: torch.Tensor,
        weight_D: torch.Tensor,
        metric_D: torch.Tensor,
        order: PairOrder,
        compute: Compute,
        sink: PairGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from shared.kernels.decode.triton import residual

        W_dec_FD = _rounded_if_read_often(W_dec_FD, values_NK, compute)
        left_ND, means = residual(values_NK, indices_NK, W_dec_FD, target_ND, b_D, weight_D, metric_D)
        ctx.save_for_backward(values_NK, indices_NK, W_dec_FD, left_ND, weight_D)
        ctx.order, ctx.compute, ctx.sink = order, compute, sink
        loss, metric = means.unbind()
        ctx.mark_non_differentiable(metric, left_ND)
        return loss, metric, left_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from shared.kernels.decode.triton import residual_grad

        values_NK, indices_NK, W_dec_FD, left_ND, weight_D = ctx.saved_tensors
        dtype = torch.bfloat16 if ctx.compute.dtype_for(left_ND) == "bfloat16" else torch.float32
        grad_ND, db_D = residual_grad(left_ND, weight_D, upstream, dtype)
        dv_NK, dW_FD = _decoder_gradients(ctx, values_NK, indices_NK, W_dec_FD, grad_ND)
        return dv_NK, None, dW_FD, db_D if ctx.needs_input_grad[3] else None, None, None, None, None, None, None


def _decoder_gradients(
    ctx: Any, values_NK: torch.Tensor, indices_NK: torch.Tensor, W_dec_FD: torch.Tensor, grad_ND: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of the values, and of W_dec where that does not go to the sink."""
    need_values, _, need_W = ctx.needs_input_grad[:3]
    options = {"kernels": ctx.compute.kernels}
    dv_NK = dot_picks(grad_ND, indices_NK, W_dec_FD, **options) if need_values else None
    if need_W and ctx.sink is not None:
        ctx.sink.add(values_NK.detach(), indices_NK, ctx.order, grad_ND)
    elif need_W:
        return dv_NK, row_grad(values_NK, indices_NK, grad_ND, W_dec_FD.shape[0], ctx.order, **options)
    return dv_NK, None


class _TakeRows(torch.autograd.Function):
    """index_select whose backward hands the rows' gradient to a PairGradient instead of making an [F, D] one."""

    @staticmethod
    def forward(ctx: Any, weight_FD: torch.Tensor, latents_R: torch.Tensor, sink: PairGradient) -> torch.Tensor:
        ctx.save_for_backward(latents_R)
        ctx.sink = sink
        return weight_FD.index_select(0, latents_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[None, None, None]:
        ctx.sink.add_rows(ctx.saved_tensors[0], grad_RD)
        return None, None, None


def _rounded(rows: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Rows that kernels gather, in half the bytes where that was asked for: a GPU's sums over them stay in float32."""
    return (
        rows.bfloat16()
        if compute.dtype_for(rows) == "bfloat16" and resolve(compute.kernels, rows) == "triton"
        else rows
    )


def _rounded_if_read_often(W_dec_FD: torch.Tensor, values_NK: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Half the bytes, where the gathers save more of them than the copy costs."""
    return _rounded(W_dec_FD, compute) if values_NK.numel() > 2 * W_dec_FD.shape[0] else W_dec_FD


def attach_encoder(
    centred_ND: torch.Tensor,
    b_pre_D: torch.Tensor | None,
    W_enc_FD: torch.Tensor,
    b_enc_F: torch.Tensor,
    values_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    order: PairOrder,
    *,
    compute: Compute = AUTO,
    sink: PairGradient | None = None,
) -> torch.Tensor:
    """Selected values as a differentiable function of the encoder: ``z = centred W_enc^T + b_enc`` at the picks.

    `values_NK` must be z at `indices_NK` where the index is >= 0; a pick with index -1 passes no gradient, which is
    what ReLU's zeroed picks need. Gradients flow to centred, W_enc and b_enc, each only if it is asked for. Where
    ``centred = x - b_pre``, pass centred without b_pre's history and b_pre beside it: its gradient then costs one
    matrix-vector product instead of an [N, D] gradient. With a `sink` the gradient of W_enc goes there and not to
    ``W_enc.grad``. compute.dtype bfloat16 (triton only) rounds centred for that gradient.
    """
    result: torch.Tensor = _PickedPreactivations.apply(
        centred_ND, b_pre_D, W_enc_FD, b_enc_F, values_NK, indices_NK, order, compute, sink
    )
    return result


def sparse_decode(
    values_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    W_dec_FD: torch.Tensor,
    order: PairOrder,
    *,
    compute: Compute = AUTO,
    sink: PairGradient | None = None,
) -> torch.Tensor:
    """``decode`` with gradients for the values and for W_dec; [N, D].

    With a `sink` the gradient of W_dec goes there and not to ``W_dec.grad``. compute.dtype bfloat16 (triton only)
    rounds the output's gradient and, where rows are read often enough, W_dec.
    """
    result: torch.Tensor = _SparseDecode.apply(values_NK, indices_NK, W_dec_FD, order, compute, sink)
    return result


def sparse_reconstruction(
    values_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    W_dec_FD: torch.Tensor,
    b_D: torch.Tensor,
    target_ND: torch.Tensor,
    weight_D: torch.Tensor,
    metric_D: torch.Tensor,
    order: PairOrder,
    *,
    compute: Compute = AUTO,
    sink: PairGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss ``mean_n sum_d weight_d r_nd^2`` of ``r = target - (decode + b)``, the same with `metric_D`, and r.

    Gradients for the values, W_dec and b, from the loss alone; r and the metric have none. As for ``sparse_decode``,
    with a `sink` W_dec's goes there. triton makes r and its squares in registers; the other forms are ``sparse_decode``
    and torch.
    """
    if resolve(compute.kernels, values_NK) == "triton" and values_NK.dtype == torch.float32:
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _SparseReconstruction.apply(
            values_NK, indices_NK, W_dec_FD, b_D, target_ND, weight_D, metric_D, order, compute, sink
        )
        return result
    decoded_ND = sparse_decode(values_NK, indices_NK, W_dec_FD, order, compute=compute, sink=sink)
    error_ND = decoded_ND.add_(b_D).sub_(target_ND)
    square_ND = error_ND.square()
    return (square_ND @ weight_D).mean(), (square_ND.detach() @ metric_D).mean(), -error_ND.detach()


def take_rows(weight_FD: torch.Tensor, latents_R: torch.Tensor, sink: PairGradient | None = None) -> torch.Tensor:
    """``weight[latents]``, [R, D], for distinct latents; with a `sink` its gradient goes there."""
    if sink is None:
        return weight_FD.index_select(0, latents_R)
    result: torch.Tensor = _TakeRows.apply(weight_FD, latents_R, sink)
    return result
