"""int8 in blocks of 128 values with one float16 scale per block.

Shapes: T positions, D = d_model, G = ceil(D / 128) blocks per row. A value is ``int8 * scale``.
"""

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import GranaryError
from shared.store.dtypes import INT8_BLOCK, scales_per_row

LEVELS = 127  # -127..127, symmetric: -128 is never used


def quantise(x_TD: npt.NDArray[np.float32], q_TD: npt.NDArray[np.int8], scale_TG: npt.NDArray[np.float16]) -> None:
    """Round `x_TD` to the nearest of 255 levels of its block.

    The scale is the smallest float16 with which the block's largest value still fits, so nothing is ever clipped. NaN
    and infinities, which the writer allows only at masked-out positions, become 0. Raises GranaryError where a block's
    largest value is beyond 127 x 65504, float16's largest.
    """
    for group, start in enumerate(range(0, x_TD.shape[1], INT8_BLOCK)):
        block = x_TD[:, start : start + INT8_BLOCK]
        finite = np.isfinite(block)
        if not finite.all():
            block = np.where(finite, block, np.float32(0))
        scale = _scale_at_least(np.abs(block).max(axis=1) / np.float32(LEVELS))
        scale_TG[:, group] = scale
        wide = scale.astype(np.float32)[:, None]
        ratio = np.divide(block, wide, out=np.zeros_like(block), where=wide > 0)
        np.rint(ratio, out=ratio)
        q_TD[:, start : start + INT8_BLOCK] = ratio


def _scale_at_least(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Smallest float16 that is not below `scale`."""
    if scale.max(initial=0.0) > np.finfo(np.float16).max:
        raise GranaryError("activations beyond 8.3e6 do not fit int8 with float16 scales: use store.dtype=bfloat16")
    half = scale.astype(np.float16)
    return np.where(half.astype(np.float32) < scale, np.nextafter(half, np.float16(np.inf)), half)


def dequantise_f32(
    q_TD: npt.NDArray[np.int8], scale_TG: npt.NDArray[np.float16], out_TD: npt.NDArray[np.float32]
) -> None:
    """Exact float32 values of stored int8 rows into `out_TD`."""
    for group, start in enumerate(range(0, q_TD.shape[1], INT8_BLOCK)):
        columns = slice(start, start + INT8_BLOCK)
        np.multiply(q_TD[:, columns], scale_TG[:, group, None].astype(np.float32), out=out_TD[:, columns])


def dequantise(q_TD: torch.Tensor, scale_TG: torch.Tensor, out_TD: torch.Tensor) -> None:
    """Values of stored int8 rows into `out_TD` (any float dtype, rounded once from float32), on any device."""
    T, D = q_TD.shape
    G = scales_per_row(D)
    whole = D // INT8_BLOCK * INT8_BLOCK
    if whole:
        product = q_TD[:, :whole].view(T, whole // INT8_BLOCK, INT8_BLOCK).float()
        product.mul_(scale_TG[:, : whole // INT8_BLOCK, None].float())
        out_TD[:, :whole].copy_(product.view(T, whole))
    if whole < D:
        out_TD[:, whole:].copy_(q_TD[:, whole:].float() * scale_TG[:, G - 1 :].float())
