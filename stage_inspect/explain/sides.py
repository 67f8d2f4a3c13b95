"""Which documents explanations are made from and which they are tested on: never the same one.

A document's side is a hash of the seed and of the place of its first token in the store, so that neither the order nor
the choice of examples can move it. A document that was cut at the ends of contexts counts as one: that is looked up in
the store. Where the store is not at hand, the first document of a context may be the rest of one from before: its
examples are on neither side, and of all others it is known where they begin.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shared.basics.hashes import limit, seeded
from shared.latents.examples import Example
from shared.store import Store
from shared.text.beginnings import Beginnings

Side = Literal["train", "test"]

PURPOSE = 18  # of the seed: this choice is no other's
TRAIN_SHARE = 0.5
IMAGE_DIGITS = 15  # of the hash, hexadecimal: they fit 64 bits
NUMBERS = 1 << 20  # more documents than a context has


@dataclass
class Sides:
    """Sides of the documents that examples are of."""

    store: Store | None
    seed: int

    def __post_init__(self) -> None:
        self._beginnings = None if self.store is None else Beginnings(self.store)

    @property
    def unit(self) -> str:
        """What is dealt out as a whole, for the records."""
        return "document" if self.store is not None else "document that begins within a context"

    def of(self, example: Example) -> Side | None:
        """The side of an example; None for one that is on neither."""
        if self._beginnings is None:
            return self._side(example.context * NUMBERS + example.document) if example.document > 0 else None
        return self._side(self._beginnings.place(example.context, example.document))

    def of_image(self, sha256: str) -> Side:
        """The side of an image, by the hash of its bytes: the same wherever it is shown."""
        return self._side(int(sha256[:IMAGE_DIGITS], 16))

    def _side(self, number: int) -> Side:
        is_train = seeded(self.seed, PURPOSE, np.array([number]))[0] < limit(TRAIN_SHARE)
        return "train" if is_train else "test"
