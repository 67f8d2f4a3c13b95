"""Where documents and windows lie in contexts.

B contexts of a batch, T positions, P = B * T flat positions, W positions of a window. A document is its part in one
context: where it goes on in the next, that is another.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.layout import NONE

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Places:
    """The flat positions of some contexts of the store."""

    tokens_P: Ints
    place_P: Ints
    """Position in the whole store: context * T + position."""
    segment_P: Ints
    trainable_P: npt.NDArray[np.bool_]
    document_P: Ints
    """Flat position at which the position's document begins."""
    document_end_P: Ints
    window_P: Ints
    """Flat position at which its window begins."""
    number_P: Ints
    """Position as the model numbers it."""
    next_P: Ints
    """The token that follows it in its document; `NONE` at the end."""
    seq_len: int

    @classmethod
    def of(
        cls,
        contexts: Ints,
        tokens_BT: npt.NDArray[np.int32],
        mask_BT: npt.NDArray[np.bool_],
        segments_BT: npt.NDArray[np.int32],
        *,
        window: int,
        isolated: bool,
    ) -> "Places":
        """Those of contexts as the store gives them; padding (segment -1) is never trainable."""
        B, T = tokens_BT.shape
        flat = np.arange(B * T)
        begins_BT = np.ones((B, T), bool)
        begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        starts = np.flatnonzero(begins_BT)
        number = np.cumsum(begins_BT.reshape(-1)) - 1
        document_P = starts[number]
        tokens_P = tokens_BT.reshape(-1).astype(np.int64)
        document_end_P = np.append(starts[1:], B * T)[number]
        following = np.append(tokens_P[1:], NONE)
        return cls(
            tokens_P=tokens_P,
            place_P=(contexts.astype(np.int64)[:, None] * T + np.arange(T)).reshape(-1),
            segment_P=segments_BT.reshape(-1).astype(np.int64),
            trainable_P=(mask_BT & (segments_BT >= 0)).reshape(-1),
            document_P=document_P,
            document_end_P=document_end_P,
            window_P=document_P + (flat - document_P) // window * window,
            number_P=flat - document_P if isolated else flat % T,
            next_P=np.where(flat + 1 < document_end_P, following, NONE),
            seq_len=T,
        )

    def windows(self) -> Ints:
        """Flat positions at which windows begin, padding's left out."""
        return np.flatnonzero((self.window_P == np.arange(len(self.window_P))) & (self.segment_P >= 0))


def position_edges(seq_len: int) -> list[int]:
    """First position of each group: 0, 1, 2, 4, 8 ..."""
    return [0, *(1 << power for power in range(max(1, seq_len - 1).bit_length()))]
