"""Views between torch, numpy and plain bytes. None of them copies."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Buffer = bytes | bytearray | memoryview


def byte_view(buffer: Buffer | npt.NDArray[Any]) -> memoryview:
    """`buffer`, which must be contiguous, as a flat memoryview of bytes."""
    if isinstance(buffer, np.ndarray):
        return buffer.reshape(-1).view(np.uint8).data
    return memoryview(buffer).cast("B")


def bits_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The memory of a contiguous CPU tensor as numpy; bfloat16, which numpy lacks, as its uint16 bit pattern."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.detach().numpy()
