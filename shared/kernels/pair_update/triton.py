"""``PairGradient`` on a GPU: one program per latent sums its pairs in registers, and goes on from there.

``_pair_norm`` squares the sum, ``_pair_update`` clips, projects, applies Adam and renormalises. Neither writes the
gradient: per latent, the pairs' rows are read (from L2 where [N, BLOCK_D] fits) and weight and moments pass once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shared.kernels.adam_step import AdamStep
from shared.kernels.pairs import PairOrder
from shared.kernels.row_grad import triton as row_grad
from shared.kernels.row_grad.triton import sum_pairs
from shared.kernels.row_update.triton import adam_row, load_state
from shared.kernels.tuning import tuned

BLOCK_P = 4
NORM_BLOCK_P = 4
REGISTERS = 65_536  # of a multiprocessor
NARROW = 512
UPDATE_NARROW = 256
# Bytes that a block of columns of all gathered rows may take, to stay in L2 beside what streams through it.
WIDE_BYTES = 24 << 20


@triton.jit
def _gradient(
    coefficients_ptr,
    tokens_ptr,
    offsets_ptr,
    rows_ptr,
    chunks_ptr,
    slot_ptr,
    extra_ptr,
    latent,
    columns,
    D,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    grad = sum_pairs(
        coefficients_ptr, tokens_ptr, offsets_ptr, rows_ptr, chunks_ptr, latent, columns, D, CHUNK, BLOCK_P, BLOCK_D
    )
    slot = tl.load(slot_ptr + latent).to(tl.int64)
    if slot >= 0:
        grad += tl.load(extra_ptr + slot * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _pair_norm(
    coefficients_ptr,
    tokens_ptr,
    offsets_ptr,
    rows_ptr,
    chunks_ptr,
    slot_ptr,
    extra_ptr,
    out_ptr,
    D,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    grad = _gradient(
        coefficients_ptr, tokens_ptr, offsets_ptr, rows_ptr, chunks_ptr, slot_ptr, extra_ptr, latent, columns, D,
        CHUNK, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + latent, tl.sum(grad * grad))


@triton.jit(do_not_specialize=["step"])
def _pair_update(
    coefficients_ptr,
    tokens_ptr,
    offsets_ptr,
    rows_ptr,
    chunks_ptr,
    slot_ptr,
    extra_ptr,
    weight_ptr,
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
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at, inside = latent * D + columns, columns < D
    # Before the walk over the pairs, which hides their way from memory.
    weight, first, second = load_state(weight_ptr, first_ptr, second_ptr, at, inside)
    grad = _gradient(
        coefficients_ptr, tokens_ptr, offsets_ptr, rows_ptr, chunks_ptr, slot_ptr, extra_ptr, latent, columns, D,
        CHUNK, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    adam_row(
        weight, grad * tl.load(clip_ptr), first, second, weight_ptr, first_ptr, second_ptr, at, inside,
        lr, beta1, rest1, beta2, rest2, eps, correction1, correction2, step, UNIT_ROWS,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PairWalk:
    """What both kernels read: the pairs, and further rows of the gradient of some latents."""

    term: row_grad.Walk
    slot_F: torch.Tensor
    """int32: where a latent's further row is, -1 for none."""
    extra_RD: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Return what the kernels take, in their order."""
        return (*self.term.arguments, self.slot_F, self.extra_RD)


def make_walk(
    coefficients_NK: torch.Tensor,
    order: PairOrder,
    rows_ND: torch.Tensor,
    latents_R: torch.Tensor | None,
    extra_RD: torch.Tensor | None,
) -> PairWalk:
    """Sorts the coefficients and sums the chunks, once for the norm and the update."""
    walk = row_grad.Walk.of(coefficients_NK, order, rows_ND)
    slot_F = torch.full((order.num_latents,), -1, dtype=torch.int32, device=rows_ND.device)
    if latents_R is None or extra_RD is None:
        return PairWalk(walk, slot_F, walk.chunks_CD)  # a stand-in that no latent points into
    slots_R = torch.arange(latents_R.numel(), dtype=torch.int32, device=rows_ND.device)
    return PairWalk(walk, slot_F.index_copy_(0, latents_R, slots_R), extra_RD.contiguous())


def update_config(
    d_model: int,
    unit_rows: bool,
    gathered: torch.dtype,
    num_pairs: int | None = None,
    *,
    architecture: int | None = None,
) -> dict[str, int]:
    """Block sizes and warps of ``_pair_update``, which gathers rows of that type: a whole row where it is projected.

    Else narrow columns, so that those of all rows stay in L2. `architecture`: 80, 90; None: this machine's GPU's.
    """
    if architecture is None:
        architecture = 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 90
    block: int = triton.next_power_of_2(d_model)
    block = block if unit_rows else min(block, UPDATE_NARROW)
    default = {"BLOCK_P": BLOCK_P, "BLOCK_D": block, "num_warps": min(32, max(1, block // 256))}
    if default["num_warps"] >= 16 and gathered.itemsize == 2:
        # 64: 32 warps fit, so that with 16 a second program loads while the first computes. An A100's code would spill.
        default["maxnreg"] = 64 if architecture >= 90 else min(96, REGISTERS // (32 * default["num_warps"]))
    return tuned(f"pair_update unit_rows={unit_rows}", d_model, default, num_pairs=num_pairs)


def norm_config(d_model: int, num_rows: int, gathered: torch.dtype, num_pairs: int | None = None) -> dict[str, int]:
    """Block sizes and warps of ``_pair_norm``: narrow columns, so that those of all rows stay in L2.

    Where twice as many do, and two fit into a lane's registers, a program's instructions are shared among more.
    """
    wide = gathered.itemsize == 2 and num_rows * 2 * NARROW * gathered.itemsize <= WIDE_BYTES
    block: int = min(2 * NARROW if wide else NARROW, triton.next_power_of_2(d_model))
    default = {"BLOCK_P": NORM_BLOCK_P, "BLOCK_D": block, "num_warps": min(2, max(1, block // 256))}
    return tuned("pair_norm", d_model, default, num_pairs=num_pairs)


def squared_norm(weight: torch.Tensor, walk: PairWalk) -> torch.Tensor:
    """See ``PairGradient.squared_norm``. float32."""
    num_latents, d_model = weight.shape
    rows_ND = walk.term.rows_ND
    config = norm_config(d_model, len(rows_ND), rows_ND.dtype, walk.term.tokens_P.numel())
    num_blocks = triton.cdiv(d_model, config["BLOCK_D"])
    out_BF = torch.empty(num_blocks, num_latents, dtype=torch.float32, device=weight.device)
    _pair_norm[(num_latents, num_blocks)](*walk.arguments, out_BF, d_model, CHUNK=row_grad.CHUNK, **config)
    return out_BF.sum()


def pair_update(
    weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, adam: AdamStep, walk: PairWalk
) -> None:
    """See ``PairGradient.update``. Weights are float32; moments may be bfloat16, stochastically rounded."""
    num_latents, d_model = weight.shape
    term = walk.term
    config = update_config(d_model, adam.unit_rows, term.rows_ND.dtype, term.tokens_P.numel())
    _pair_update[(num_latents, triton.cdiv(d_model, config["BLOCK_D"]))](
        *walk.arguments, weight, first, second, adam.clip, *adam.scalars, d_model,
        UNIT_ROWS=adam.unit_rows, CHUNK=row_grad.CHUNK, **config,
    )  # fmt: skip
