"""Which document each position of a context belongs to, held at two bits per position.

Shape letters: T positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stage_train.data.stream.slices import CONTEXT_BLOCK, StoreSlice


class Documents:
    """Those of all contexts of some slices of stores, one after the other. Reads them once, as the mask is read."""

    def __init__(self, slices: Sequence[StoreSlice], seq_len: int) -> None:
        self._length = seq_len
        packed = [_bits(part) for part in slices]
        self._starts, self._real = (np.concatenate(bits) for bits in zip(*packed, strict=True))

    def of(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """int64 [n, T] for some rows of the data: numbered from 0 in each context, -1 for padding.

        Where the harvest let documents of a context attend to each other, they are one document.
        """
        starts, real = (np.unpackbits(bits[rows], axis=1, count=self._length) for bits in (self._starts, self._real))
        numbers = np.cumsum(starts, axis=1, dtype=np.int64) - 1
        return torch.from_numpy(np.where(real, numbers, -1))


def _bits(part: StoreSlice) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Of a slice's contexts, where a document starts and where there is one: each uint8 [n, ceil(T / 8)]."""
    width = -(-part.store.seq_len // 8)
    starts, real = np.empty((len(part.contexts), width), np.uint8), np.empty((len(part.contexts), width), np.uint8)
    for first in range(0, len(part.contexts), CONTEXT_BLOCK):
        block = slice(first, first + CONTEXT_BLOCK)
        segments = part.store.segments(part.contexts[block])
        if not part.store.isolated:
            segments = np.where(segments < 0, segments, 0)
        is_start = np.ones(segments.shape, np.bool_)
        is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts[block], real[block] = np.packbits(is_start, axis=1), np.packbits(segments >= 0, axis=1)
    return starts, real
