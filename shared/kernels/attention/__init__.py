"""An encoder of attention: latents that are mixtures, over earlier positions, of one direction of what is read.

    z[t, i] = sum_s A_h[t, s] w_i . x_s + b_i,   h = i H // F

H heads have a pattern A_h each, made from queries and keys (``pattern``), and F / H latents each. Selection and
gradients work tile by tile (``tiles``); ``reference`` is plain autograd. There is no kernel of its own for a GPU: it is
matrix products alone. With g the gradient of z and V = x W^T + b, a tile's gradient is

    dW = (A^T g)^T x;   dA = g V^T;   dS = A (dA - rowsum(dA A));   dQ = scale dS K;   dK = scale dS^T Q

Shapes: N positions that count, K picks of each, F latents, D width of what is read, R latents of some.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.kernels.attention import tiles
from shared.kernels.attention.pattern import Form, QueryKey, patterns
from shared.kernels.attention.tiles import Attended, above, largest_of_batch, topk


class _Picked(torch.autograd.Function):
    """z at the picks, which the selection has already computed."""

    @staticmethod
    def forward(
        ctx: Any, read: Attended, values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, b_F: Tensor, *heads: Tensor
    ) -> Tensor:
        ctx.save_for_backward(indices_NK, W_FD, b_F)
        ctx.read = read
        return values_NK.view_as(values_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_NK: Tensor) -> tuple[Tensor | None, ...]:
        indices_NK, W_FD, b_F = ctx.saved_tensors
        per_head = len(W_FD) // len(ctx.read.heads.W_Q_GED)
        dz_NK = dz_NK.masked_fill(indices_NK < 0, 0)
        spread = tiles.spread_pairs(ctx.read, dz_NK, indices_NK, per_head)
        return None, None, None, *tiles.gradients(ctx.read, W_FD, b_F, spread)


class _All(torch.autograd.Function):
    """z of all latents."""

    @staticmethod
    def forward(ctx: Any, read: Attended, W_FD: Tensor, b_F: Tensor, *heads: Tensor) -> Tensor:
        ctx.save_for_backward(W_FD, b_F)
        ctx.read = read
        return tiles.everything(read, W_FD, b_F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_NF: Tensor) -> tuple[Tensor | None, ...]:
        W_FD, b_F = ctx.saved_tensors
        per_head = len(W_FD) // len(ctx.read.heads.W_Q_GED)
        return None, *tiles.gradients(ctx.read, W_FD, b_F, tiles.spread_rows(ctx.read, dz_NF, per_head))


class _Some(torch.autograd.Function):
    """z of some latents, whose own weights alone have a gradient: patterns are as they are."""

    @staticmethod
    def forward(ctx: Any, read: Attended, heads_R: Tensor, W_RD: Tensor, b_R: Tensor) -> Tensor:
        ctx.read, ctx.heads_R = read, heads_R
        ctx.save_for_backward(W_RD)
        C, T, _ = read.x_CTD.shape
        z_SR = W_RD.new_empty(C * T, len(W_RD))
        for contexts, A_C1TT, own_r in _patterns_of(read, heads_R):
            z_SR[contexts.start * T : contexts.stop * T, own_r] = tiles.mixed(
                A_C1TT, read.x_CTD[contexts], W_RD[own_r], read.compute
            )
        return z_SR.index_select(0, read.places_N) + b_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_NR: Tensor) -> tuple[Tensor | None, ...]:
        (W_RD,), read = ctx.saved_tensors, ctx.read
        C, T, D = read.x_CTD.shape
        dz_SR = dz_NR.new_zeros(C * T, dz_NR.shape[1]).index_copy_(0, read.places_N, dz_NR)
        dW_RD = torch.zeros_like(W_RD)
        for contexts, A_C1TT, own_r in _patterns_of(read, ctx.heads_R):
            dz_CTr = dz_SR[contexts.start * T : contexts.stop * T][:, own_r].unflatten(0, (-1, T))
            dv_CTr = A_C1TT[:, 0].transpose(1, 2) @ dz_CTr
            dW_RD[own_r] += dv_CTr.flatten(0, 1).T @ read.x_CTD[contexts].reshape(-1, D)
        return None, None, dW_RD, dz_NR.sum(0)


def _patterns_of(read: Attended, heads_R: Tensor) -> Any:
    """(Contexts, patterns [C, 1, T, T] of one head, which of the latents are its) of every head that has any."""
    alone = range(len(read.heads.W_Q_GED))
    own = [(head, (heads_R == head).nonzero().squeeze(1)) for head in alone]
    for head, own_r in own:
        if not len(own_r):
            continue
        one = Attended(
            read.x_CTD, read.documents_CT, read.places_N, read.heads.heads(slice(head, head + 1)), read.form,
            read.compute,
        )  # fmt: skip
        for contexts, _ in tiles.tiles(one):
            x_CTD, documents_CT = read.x_CTD[contexts], read.documents_CT[contexts]
            yield contexts, patterns(x_CTD, documents_CT, one.heads, read.form, read.compute), own_r


def attach_attention(read: Attended, values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """Selected values as a differentiable function of all weights of the encoder; see ``attach_encoder``."""
    result: Tensor = _Picked.apply(read, values_NK, indices_NK, W_FD, b_F, *read.heads.tensors())
    return result


def attend_all(read: Attended, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """z [N, F] of all latents, differentiable in all weights; patterns are not kept."""
    result: Tensor = _All.apply(read, W_FD, b_F, *read.heads.tensors())
    return result


def attend_some(read: Attended, heads_R: Tensor, W_RD: Tensor, b_R: Tensor) -> Tensor:
    """z [N, R] of latents of the heads `heads_R`, differentiable in their own rows and biases alone."""
    result: Tensor = _Some.apply(read, heads_R, W_RD, b_R)
    return result


__all__ = [
    "Attended",
    "Form",
    "QueryKey",
    "above",
    "attach_attention",
    "attend_all",
    "attend_some",
    "largest_of_batch",
    "patterns",
    "topk",
]
