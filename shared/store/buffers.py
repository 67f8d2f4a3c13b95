"""Views between torch, numpy and plain bytes, none of which copies; memory that chunks are copied from and to fast."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

PAGE_BYTES = 4096
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


def empty_to_read(shape: Sequence[int], dtype: torch.dtype, *, pin: bool = False) -> torch.Tensor:
    """`torch.empty` on the CPU for contexts that are read from a store: it begins with a page of memory.

    On AMD Zen 3 (measured) and 4 (reported) the kernel copies at a quarter of its speed to where the address within a
    page is 1 to 31 bytes above that of the source (https://sourceware.org/bugzilla/show_bug.cgi?id=30994), and each
    chunk of a shard lies 4 bytes further than the one before, behind its checksum. torch.empty begins 64 bytes into a
    page: 7 of a shard's first 16 chunks.
    """
    return _empty_at(0, shape, dtype, pin)


def empty_to_write(shape: Sequence[int], dtype: torch.dtype, *, pin: bool = False) -> torch.Tensor:
    """Likewise for rows that are written, where the pages of the shard are the destination: near the end of a page."""
    return _empty_at(PAGE_BYTES - 64, shape, dtype, pin)


def _empty_at(place: int, shape: Sequence[int], dtype: torch.dtype, pin: bool) -> torch.Tensor:
    num_bytes = prod(shape) * dtype.itemsize
    raw = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pin)
    start = (place - raw.data_ptr()) % PAGE_BYTES
    return raw[start : start + num_bytes].view(dtype).view(*shape)
