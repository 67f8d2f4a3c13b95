"""What the stream asks of a store, and the parts of stores that a run reads.

Shape letters: T positions, d a width.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

# Contexts whose mask or documents are read at a time while they are packed.
CONTEXT_BLOCK = 4096


class ActivationStore(Protocol):
    """The part of shared.store.Store that the stream uses."""

    @property
    def seq_len(self) -> int:
        """Tokens per context."""

    @property
    def isolated(self) -> bool:
        """Whether the harvest kept the documents of a context apart; asked for whole contexts alone."""

    def mask(self, contexts: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Trainable positions, bool [n, T]."""

    def segments(self, contexts: NDArray[np.int64]) -> NDArray[np.int32]:
        """Documents of the positions, [n, T], -1 for padding; asked for whole contexts alone."""

    def read_context(self, hook: str, context: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """One context's activations [T, d]."""


@dataclass(frozen=True)
class StoreSlice:
    """A store, the contexts of it that may be read, and how often per epoch."""

    store: ActivationStore
    contexts: NDArray[np.int64]
    weight: float = 1.0
    """Times each token is read per epoch: 2 is twice, 0.5 is a random half of the contexts, another in each epoch."""


def mask_bits(part: StoreSlice) -> NDArray[np.uint8]:
    """The mask of a slice's contexts at one bit per position: uint8 [n, ceil(T / 8)]."""
    blocks = [
        np.packbits(part.store.mask(part.contexts[start : start + CONTEXT_BLOCK]), axis=1)
        for start in range(0, len(part.contexts), CONTEXT_BLOCK)
    ]
    if not blocks:
        return np.empty((0, -(-part.store.seq_len // 8)), np.uint8)
    return np.concatenate(blocks)
