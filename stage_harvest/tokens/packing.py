"""Documents to contexts of exactly T tokens.

A context is filled with documents one after the other; the part of a document that does not fit goes on in the next
context or is dropped. Nothing is padded but the end of the last context.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.lm import SpecialIds
from stage_harvest.config import BosPlacement, LongDocuments, PackingSchema

PADDING_SEGMENT = -1


class Context(NamedTuple):
    """One packed context."""

    tokens_T: npt.NDArray[np.int32]
    mask_T: npt.NDArray[np.bool_]
    """True where a position may be trained on: no padding and, if so configured, no special token."""
    segments_T: npt.NDArray[np.int32]
    """Index of the position's document within the context; -1 on padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packer:
    """How documents are packed."""

    seq_len: int
    special: SpecialIds
    bos: BosPlacement
    long_documents: LongDocuments
    drop_last: bool
    mask_special: bool

    @classmethod
    def from_config(cls, cfg: PackingSchema, special: SpecialIds) -> "Packer":
        """Raises GranaryError for contexts too short to hold BOS and a token."""
        if cfg.seq_len < 2:
            raise GranaryError(f"packing.seq_len={cfg.seq_len}: a context needs at least 2 tokens")
        return cls(
            seq_len=cfg.seq_len,
            special=special,
            bos=cfg.bos,
            long_documents=cfg.long_documents,
            drop_last=cfg.drop_last,
            mask_special=cfg.mask_special,
        )

    def pack(self, documents: Iterable[npt.NDArray[np.int32]]) -> Iterator[Context]:
        """Contexts of the token ids of `documents`; empty documents leave no trace."""
        pieces: list[tuple[int, npt.NDArray[np.int32]]] = []  # (document index within the context, ids with BOS)
        room, segment = self.seq_len, 0
        bos = None if self.bos is BosPlacement.none else self.special.bos
        for ids in documents:
            if ids.size and ids[0] == bos:
                ids = ids[1:]
            is_start = True
            while ids.size:
                wants_bos = bos is not None and (
                    is_start or (self.bos is BosPlacement.context and room == self.seq_len)
                )
                head = np.asarray([bos] if wants_bos else [], np.int32)
                body = ids[: room - head.size]
                pieces.append((segment, np.concatenate([head, body])))
                ids = ids[body.size :]
                room -= head.size + body.size
                segment += 1
                # A BOS that took the last place alone only fills it: the document starts anew in the next context.
                is_start = is_start and not body.size
                if room == 0:
                    yield self._context(pieces)
                    pieces, room, segment = [], self.seq_len, 0
                    if self.long_documents is LongDocuments.truncate and not is_start:
                        break
        if pieces and not self.drop_last:
            yield self._context(pieces)

    def _context(self, pieces: list[tuple[int, npt.NDArray[np.int32]]]) -> Context:
        tokens_T = np.full(self.seq_len, self.special.pad, np.int32)
        segments_T = np.full(self.seq_len, PADDING_SEGMENT, np.int32)
        start = 0
        for segment, ids in pieces:
            tokens_T[start : start + ids.size] = ids
            segments_T[start : start + ids.size] = segment
            start += ids.size
        mask_T = segments_T != PADDING_SEGMENT
        if self.mask_special:
            mask_T &= ~np.isin(tokens_T, self.special.all)
        return Context(tokens_T, mask_T, segments_T)
