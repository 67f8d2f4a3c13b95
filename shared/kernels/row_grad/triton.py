"""``row_grad`` on a GPU: one program per latent and block of columns walks over the latent's sorted pairs.

Every sum has one owner and one order: no atomics, the same bits on every run. A latent that fires on many tokens makes
a long walk, so each step gathers BLOCK_P rows at once.
"""

import torch
import triton
import triton.language as tl

from shared.kernels.pairs import SortedPairs
from shared.kernels.tuning import tuned

MAX_BLOCK_D = 512
BLOCK_P = 8
SUM_BLOCK_P = 128


@triton.jit
def sum_pairs(
    coefficients_ptr,
    order_ptr,
    offsets_ptr,
    rows_ptr,
    latent,
    columns,
    K,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns of one latent's gradient: the weighted sum of its pairs' rows, in pair order."""
    inside = columns < D
    first = tl.load(offsets_ptr + latent)
    last = tl.load(offsets_ptr + latent + 1)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(first, last, BLOCK_P):
        pairs = start + tl.arange(0, BLOCK_P)
        present = pairs < last
        order = tl.load(order_ptr + pairs, mask=present, other=0)
        coefficients = tl.load(coefficients_ptr + order, mask=present, other=0.0).to(tl.float32)
        both = present[:, None] & inside[None, :]
        rows = tl.load(rows_ptr + (order // K)[:, None] * D + columns[None, :], mask=both, other=0.0)
        total += tl.sum(coefficients[:, None] * rows.to(tl.float32), axis=0)
    return total


@triton.jit
def _row_grad(
    coefficients_ptr, order_ptr, offsets_ptr, rows_ptr, out_ptr, K, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = sum_pairs(coefficients_ptr, order_ptr, offsets_ptr, rows_ptr, latent, columns, K, D, BLOCK_P, BLOCK_D)
    tl.store(out_ptr + latent * D + columns, total, mask=columns < D)


@triton.jit
def _latent_sum(coefficients_ptr, order_ptr, offsets_ptr, out_ptr, BLOCK_P: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + latent)
    last = tl.load(offsets_ptr + latent + 1)
    total = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(first, last, BLOCK_P):
        pairs = start + tl.arange(0, BLOCK_P)
        order = tl.load(order_ptr + pairs, mask=pairs < last, other=0)
        total += tl.load(coefficients_ptr + order, mask=pairs < last, other=0.0).to(tl.float32)
    tl.store(out_ptr + latent, tl.sum(total))


def config_for(d_model: int) -> dict[str, int]:
    """Block sizes and warps of ``_row_grad``."""
    block = min(MAX_BLOCK_D, triton.next_power_of_2(d_model))
    return tuned("row_grad", d_model, {"BLOCK_P": BLOCK_P, "BLOCK_D": block, "num_warps": 4})


def row_grad(coefficients_NK: torch.Tensor, pairs: SortedPairs, rows_ND: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.row_grad.row_grad``. The result is float32 whatever the inputs' type."""
    num_latents, d_model = pairs.offsets_F.numel() - 1, rows_ND.shape[1]
    out_FD = torch.empty(num_latents, d_model, dtype=torch.float32, device=rows_ND.device)
    config = config_for(d_model)
    _row_grad[(num_latents, triton.cdiv(d_model, config["BLOCK_D"]))](
        coefficients_NK.contiguous(), pairs.order_P, pairs.offsets_F, rows_ND.contiguous(), out_FD,
        coefficients_NK.shape[1], d_model, **config,
    )  # fmt: skip
    return out_FD


def latent_sum(coefficients_NK: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
    """See ``shared.kernels.row_grad.latent_sum``. The result is float32 whatever the input's type."""
    num_latents = pairs.offsets_F.numel() - 1
    out_F = torch.empty(num_latents, dtype=torch.float32, device=coefficients_NK.device)
    _latent_sum[(num_latents,)](
        coefficients_NK.contiguous(), pairs.order_P, pairs.offsets_F, out_F, BLOCK_P=SUM_BLOCK_P
    )
    return out_F
