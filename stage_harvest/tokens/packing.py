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
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode, PackingSchema

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

    mode: PackingMode
    seq_len: int
    special: SpecialIds
    bos: BosPlacement
    long_documents: LongDocuments
    drop_last: bool
    mask_special: bool
    mask_first: int
    """Positions masked at the start of each sequence that the model sees: a document, or a context of joined ones."""

    @classmethod
    def from_config(cls, cfg: PackingSchema, special: SpecialIds) -> "Packer":
        """Raises GranaryError for contexts too short to hold BOS and a token, and for settings that exclude another."""
        if cfg.seq_len < 2:
            raise GranaryError(f"packing.seq_len={cfg.seq_len}: a context needs at least 2 tokens")
        if cfg.mask_first is not None and not 0 <= cfg.mask_first < cfg.seq_len:
            raise GranaryError(
                f"packing.mask_first={cfg.mask_first}: it must be at least 0 and below packing.seq_len, or null"
            )
        if cfg.drop_last and cfg.mode is PackingMode.separate:
            raise GranaryError("packing.drop_last=true does not go with packing=separate: each context ends early")
        has_bos = special.bos is not None and cfg.bos is not BosPlacement.none
        return cls(
            mode=cfg.mode,
            seq_len=cfg.seq_len,
            special=special,
            bos=cfg.bos,
            long_documents=cfg.long_documents,
            drop_last=cfg.drop_last,
            mask_special=cfg.mask_special,
            mask_first=int(not has_bos) if cfg.mask_first is None else cfg.mask_first,
        )

    @property
    def bos_id(self) -> int | None:
        """What is put before each document; None for nothing."""
        return None if self.bos is BosPlacement.none else self.special.bos

    def pack(self, documents: Iterable[npt.NDArray[np.int32]]) -> Iterator[Context]:
        """Contexts of the token ids of `documents`; empty documents leave no trace."""
        pieces: list[tuple[int, npt.NDArray[np.int32]]] = []  # (document index within the context, ids with BOS)
        room, segment = self.seq_len, 0
        bos = self.bos_id
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
            if pieces and self.mode is PackingMode.separate:
                yield self._context(pieces)
                pieces, room, segment = [], self.seq_len, 0
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
        mask_T[self._start_positions(segments_T)] = False
        if self.mask_special:
            mask_T &= ~np.isin(tokens_T, self.special.all)
        return Context(tokens_T, mask_T, segments_T)

    def _start_positions(self, segments_T: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """The first `mask_first` positions of each sequence."""
        if self.mode is PackingMode.joined:
            return np.arange(self.mask_first)
        starts = np.flatnonzero(np.diff(segments_T, prepend=PADDING_SEGMENT - 1))
        sequence = np.searchsorted(starts, np.arange(self.seq_len), side="right") - 1
        return np.flatnonzero(np.arange(self.seq_len) - starts[sequence] < self.mask_first)
