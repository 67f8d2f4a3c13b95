"""Which documents explanations are made from and which they are tested on: never the same one.

A document's side is a hash of the seed and of the place of its first token in the store, so that neither the order nor
the choice of examples can move it. A document that was cut at the ends of contexts counts as one: that is looked up in
the store. Where the store is not at hand, contexts are dealt out in blocks, and examples from the first document of a
block, which may have begun in the block before, are on neither side.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.latents.examples import Example
from shared.store import Store
from stage_inspect.concepts.documents import REACH
from stage_inspect.scan.hashes import limit, seeded

Side = Literal["train", "test"]

PURPOSE = 18  # of the seed: this choice is no other's
TRAIN_SHARE = 0.5
BLOCK = 64  # contexts dealt out together without a store


@dataclass
class Sides:
    """Sides of the documents that examples are of."""

    store: Store | None
    seed: int

    def __post_init__(self) -> None:
        self._starts: dict[tuple[int, int], int] = {}

    @property
    def unit(self) -> str:
        """What is dealt out as a whole, for the records."""
        return "document" if self.store is not None else f"block of {BLOCK} contexts"

    def of(self, example: Example) -> Side | None:
        """The side of an example; None for one that is on neither."""
        if self.store is None:
            if example.context % BLOCK == 0 and example.document == 0 and example.context > 0:
                return None
            return self._side(example.context // BLOCK)
        return self._side(self.document(example.context, example.document))

    def document(self, context: int, document: int) -> int:
        """Number of a document of the store: the place of its first token, by its part in a context."""
        key = (context, document)
        if key not in self._starts:
            assert self.store is not None
            self._starts[key] = first_place(self.store, context, document)
        return self._starts[key]

    def _side(self, number: int) -> Side:
        is_train = seeded(self.seed, PURPOSE, np.array([number]))[0] < limit(TRAIN_SHARE)
        return "train" if is_train else "test"


def first_place(store: Store, context: int, document: int) -> int:
    """context * T + position of the first token of a document, followed back over the contexts that it was cut at.

    As `stage_inspect.concepts.documents` puts documents together: one that fills a context to its end may go on in the
    next. Followed over `REACH` contexts.
    """
    packing = store.plan.provenance.get("packing", {})
    goes_on = packing.get("long_documents") == "split" and packing.get("mode") != "separate"
    low = max(0, context - REACH) if goes_on else context
    segments_BT = store.segments(np.arange(low, context + 1))
    row, start = len(segments_BT) - 1, int(np.argmax(segments_BT[-1] == document))
    while goes_on and row > 0 and start == 0 and segments_BT[row - 1, -1] >= 0:
        row -= 1
        start = int(np.argmax(segments_BT[row] == segments_BT[row, -1]))
    return (low + row) * store.seq_len + start
