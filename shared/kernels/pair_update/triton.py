"""``PairGradient`` on a GPU: one program per latent sums its pairs in registers, and goes on from there.

``_pair_norm`` squares the sum, ``_pair_update`` clips, projects, applies Adam and renormalises. Neither writes the
gradient: per latent, the pairs' rows are read (from L2 where [N, BLOCK_D] fits) and weight and moments pass once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from shared.kernels.adam_step import AdamStep
from shared.kernels.pairs import PairOrder
from shared.kernels.row_grad.triton import sum_pairs
from shared.kernels.row_update.triton import adam_row
from shared.kernels.tuning import tuned

BLOCK_P = 4
NORM_BLOCK_P = 8
NORM_BLOCK_D = 512


@triton.jit
def _gradient(
    coefficients_ptr,
    order_ptr,
    offsets_ptr,
    rows_ptr,
    slot_ptr,
    extra_ptr,
    latent,
    columns,
    K,
    D,
    HAS_EXTRA: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    grad = sum_pairs(coefficients_ptr, order_ptr, offsets_ptr, rows_ptr, latent, columns, K, D, BLOCK_P, BLOCK_D)
    if HAS_EXTRA:
        slot = tl.load(slot_ptr + latent).to(tl.int64)
        if slot >= 0:
            grad += tl.load(extra_ptr + slot * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _pair_norm(
    coefficients_ptr,
    order_ptr,
    offsets_ptr,
    rows_ptr,
    slot_ptr,
    extra_ptr,
    out_ptr,
    K,
    D,
    HAS_EXTRA: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad = _gradient(
        coefficients_ptr, order_ptr, offsets_ptr, rows_ptr, slot_ptr, extra_ptr, latent, columns, K, D,
        HAS_EXTRA, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + latent, tl.sum(grad * grad))


@triton.jit
def _pair_update(
    coefficients_ptr,
    order_ptr,
    offsets_ptr,
    rows_ptr,
    slot_ptr,
    extra_ptr,
    weight_ptr,
    first_ptr,
    second_ptr,
    clip_ptr,
    lr,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    K,
    D,
    UNIT_ROWS: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad = _gradient(
        coefficients_ptr, order_ptr, offsets_ptr, rows_ptr, slot_ptr, extra_ptr, latent, columns, K, D,
        HAS_EXTRA, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    adam_row(
        weight_ptr, grad * tl.load(clip_ptr), first_ptr, second_ptr, latent * D + columns, columns < D,
        lr, beta1, beta2, eps, correction1, correction2, UNIT_ROWS,
    )  # fmt: skip


def update_config(d_model: int, unit_rows: bool) -> dict[str, int]:
    """Block sizes and warps of ``_pair_update``: a whole row where rows are projected."""
    block: int = triton.next_power_of_2(d_model)
    block = block if unit_rows else min(block, 1024)
    default = {"BLOCK_P": BLOCK_P, "BLOCK_D": block, "num_warps": min(16, max(1, block // 256))}
    return tuned(f"pair_update unit_rows={unit_rows}", d_model, default)


def norm_config(d_model: int) -> dict[str, int]:
    """Block sizes and warps of ``_pair_norm``: narrow columns, so that a column of all rows stays in L2."""
    block: int = min(NORM_BLOCK_D, triton.next_power_of_2(d_model))
    return tuned("pair_norm", d_model, {"BLOCK_P": NORM_BLOCK_P, "BLOCK_D": block, "num_warps": 4})


def squared_norm(
    weight: torch.Tensor,
    coefficients_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    order: PairOrder,
    rows_ND: torch.Tensor,
    latents_R: torch.Tensor | None,
    extra_RD: torch.Tensor | None,
) -> torch.Tensor:
    """See ``PairGradient.squared_norm``. float32."""
    num_latents, d_model = weight.shape
    config = norm_config(d_model)
    num_blocks = triton.cdiv(d_model, config["BLOCK_D"])
    out_BF = torch.empty(num_blocks, num_latents, dtype=torch.float32, device=weight.device)
    arguments = _arguments(num_latents, coefficients_NK, order, rows_ND, latents_R, extra_RD)
    _pair_norm[(num_latents, num_blocks)](
        *arguments, out_BF, coefficients_NK.shape[1], d_model, HAS_EXTRA=latents_R is not None, **config
    )
    return out_BF.sum()


def pair_update(
    weight: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    adam: AdamStep,
    coefficients_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    order: PairOrder,
    rows_ND: torch.Tensor,
    latents_R: torch.Tensor | None,
    extra_RD: torch.Tensor | None,
) -> None:
    """See ``PairGradient.update``. Weights are float32; moments may be bfloat16."""
    num_latents, d_model = weight.shape
    config = update_config(d_model, adam.unit_rows)
    arguments = _arguments(num_latents, coefficients_NK, order, rows_ND, latents_R, extra_RD)
    _pair_update[(num_latents, triton.cdiv(d_model, config["BLOCK_D"]))](
        *arguments, weight, first, second, adam.clip, adam.lr, *adam.betas, adam.eps, *adam.corrections,
        coefficients_NK.shape[1], d_model,
        UNIT_ROWS=adam.unit_rows, HAS_EXTRA=latents_R is not None, **config,
    )  # fmt: skip


def _arguments(
    num_latents: int,
    coefficients_NK: torch.Tensor,
    order: PairOrder,
    rows_ND: torch.Tensor,
    latents_R: torch.Tensor | None,
    extra_RD: torch.Tensor | None,
) -> tuple[Any, ...]:
    pairs = order.get()
    common = (coefficients_NK.contiguous(), pairs.order_P, pairs.offsets_F, rows_ND.contiguous())
    if latents_R is None or extra_RD is None:
        return (*common, pairs.order_P, rows_ND)  # stand-ins that are not read
    slot_F = torch.full((num_latents,), -1, dtype=torch.int32, device=rows_ND.device)
    slot_F[latents_R] = torch.arange(latents_R.numel(), dtype=torch.int32, device=rows_ND.device)
    return (*common, slot_F, extra_RD.contiguous())
