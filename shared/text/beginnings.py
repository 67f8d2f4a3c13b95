"""Where documents of a store begin, also those that were cut at the ends of contexts, however long they are.

And how a document is told from others by its first tokens, wherever in the store and however often it stands.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from shared.store import Store
from shared.text.documents import Document, Ints, goes_on

HEAD = 1024  # tokens that a document is known by
ROWS = 64  # contexts whose segments are read together
BLOCKS = 4096  # of them that are remembered
PLACES = 1 << 18  # of parts that are remembered: latents share windows


@dataclass
class Beginnings:
    """Places, context * T + position, of the first tokens of documents.

    A document that ends where its context does can't be told from one that goes on in the next: the document behind it
    counts as its continuation, so that no document ever counts as two.
    """

    store: Store
    _known: dict[int, int] = field(default_factory=dict)
    """By the context: where the document begins that it begins with."""

    def __post_init__(self) -> None:
        self._edges = lru_cache(BLOCKS)(self._read_edges)
        self.place = lru_cache(PLACES)(self._place)
        """Of (context, document's number in it): its place."""

    def head(self, document: Document) -> bytes:
        """A hash of the document's first `HEAD` tokens: the same for each part of it, and for each copy."""
        context, position = divmod(int(document.places[0]), self.store.seq_len)
        begins = self._first(context) if position == 0 else int(document.places[0])
        tokens = document.tokens if begins == document.places[0] else self._tokens_from(begins)
        return hashlib.sha256(tokens[:HEAD].astype("<i8").tobytes()).digest()

    def _tokens_from(self, place: int) -> Ints:
        """The first tokens, `HEAD` or more, of a document that begins here and reaches at least as far."""
        context, position = divmod(place, self.store.seq_len)
        rows = range(context, min(self.store.num_contexts, context + 1 + -(-HEAD // self.store.seq_len)))
        return self.store.tokens(rows).reshape(-1)[position:].astype(np.int64)

    def _place(self, context: int, document: int) -> int:
        start = int(np.argmax(self.store.segments([context])[0] == document))
        return self._first(context) if start == 0 else context * self.store.seq_len + start

    def _first(self, context: int) -> int:
        """Where the document begins that a context begins with."""
        passed, row, place = [], context, None
        while place is None and row not in self._known:
            passed.append(row)
            if row == 0 or not goes_on(self.store) or self._edge(row)[0] < 0 or self._edge(row - 1)[1] < 0:
                place = row * self.store.seq_len
            elif (start := self._edge(row - 1)[2]) > 0:
                place = (row - 1) * self.store.seq_len + start
            row -= 1
        found = self._known[row] if place is None else place
        self._known.update(dict.fromkeys(passed, found))
        return found

    def _edge(self, context: int) -> list[int]:
        """First document of a context, its last, and where in the context that begins; -1 where there is none."""
        edge: list[int] = self._edges(context // ROWS)[context % ROWS].tolist()
        return edge

    def _read_edges(self, block: int) -> Ints:
        rows = range(block * ROWS, min((block + 1) * ROWS, self.store.num_contexts))
        segments_BT = self.store.segments(rows)
        last_B = segments_BT[:, -1]
        return np.stack([segments_BT[:, 0], last_B, np.argmax(segments_BT == last_B[:, None], 1)], 1)
