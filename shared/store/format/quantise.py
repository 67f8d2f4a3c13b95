"""int8 in blocks of 128 values with one float16 scale per block.

Shapes: N rows, D = d_model, G = ceil(D / 128) blocks per row, B values in a block. A value is ``int8 * scale``.
Everything runs on the calling thread: rows go in pieces below the size from which torch brings in threads of its own.
"""

import numpy as np
import torch

from shared.basics.errors import GranaryError
from shared.store.format.dtypes import INT8_BLOCK, TORCH_SERIAL_ELEMENTS

LEVELS = 127  # -127..127, symmetric: -128 is never used


def quantise(x_ND: torch.Tensor, q_ND: torch.Tensor, scale_NG: torch.Tensor) -> bool:
    """Round float32 `x_ND` to the nearest of 255 levels of its block; int8 and float16 results.

    The scale is the smallest float16 with which the block's largest value still fits, so nothing is ever clipped.
    Returns False where a value is NaN or infinite; those become 0. Raises GranaryError where a block's largest value
    is beyond 127 x 65504, float16's largest.
    """
    largest_NG = torch.empty(scale_NG.shape)
    for x_NGB, _, largest in _pieces(x_ND, q_ND, largest_NG):
        torch.amax(x_NGB.abs(), dim=2, out=largest)
    finite = bool(largest_NG.isfinite().all())
    if not finite:
        x_ND = torch.nan_to_num(x_ND, nan=0.0, posinf=0.0, neginf=0.0)
        for x_NGB, _, largest in _pieces(x_ND, q_ND, largest_NG):
            torch.amax(x_NGB.abs(), dim=2, out=largest)
    scale_NG.copy_(_half_at_least(largest_NG / LEVELS))
    inverse_NG = torch.where(scale_NG > 0, 1 / scale_NG.float(), 0.0)
    for x_NGB, q_NGB, inverse in _pieces(x_ND, q_ND, inverse_NG):
        ratio = (x_NGB * inverse.unsqueeze(2)).numpy()
        np.copyto(q_NGB.numpy(), np.rint(ratio, out=ratio), casting="unsafe")  # torch's round_ always brings threads
    return finite


def dequantise(q_ND: torch.Tensor, scale_NG: torch.Tensor, out_ND: torch.Tensor) -> None:
    """Values of int8 rows into `out_ND` of any float dtype, rounded once from the exact float32 product."""
    for q_NGB, out_NGB, scale in _pieces(q_ND, out_ND, scale_NG):
        if out_NGB.dtype == torch.float32:
            out_NGB.copy_(q_NGB).mul_(scale.float().unsqueeze(2))
        else:
            out_NGB.copy_(q_NGB.float().mul_(scale.float().unsqueeze(2)))


def _half_at_least(scale: torch.Tensor) -> torch.Tensor:
    """Smallest float16 that is not below `scale`."""
    if scale.max() > torch.finfo(torch.float16).max:
        raise GranaryError("activations beyond 8.3e6 do not fit int8 with float16 scales: use store.dtype=bfloat16")
    half = scale.half()
    above = torch.from_numpy(np.nextafter(half.numpy(), np.float16(np.inf)))
    return torch.where(half.float() < scale, above, half)


def _pieces(
    one_ND: torch.Tensor, two_ND: torch.Tensor, scale_NG: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Views [n, G, B], [n, G, B], [n, G] of a few rows each; the last block of a row apart where it is shorter."""
    D = one_ND.shape[1]
    whole = D - D % INT8_BLOCK
    rows = max(1, TORCH_SERIAL_ELEMENTS // D)
    pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for columns, blocks in ((slice(0, whole), slice(0, whole // INT8_BLOCK)), (slice(whole, D), slice(-1, None))):
        if columns.start == columns.stop:
            continue
        size = min(INT8_BLOCK, columns.stop - columns.start)
        one, two = (part[:, columns].unflatten(1, (-1, size)).split(rows) for part in (one_ND, two_ND))
        pieces += zip(one, two, scale_NG[:, blocks].split(rows), strict=True)
    return pieces
