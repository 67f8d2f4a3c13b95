"""Several corpora mixed by weight, in tokens.

The next document always comes from the part that is furthest behind its share, so the shares hold at every point of the
stream and not only on average, without a random number. The mixture ends when the part whose turn it is has no more
documents: going on with the others would change the shares.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from stage_harvest.config import CorpusSchema
from stage_harvest.corpus.base import Corpus, CorpusSource

TokenIds = TypeVar("TokenIds", bound=npt.NDArray[np.integer[Any]])


@dataclass(frozen=True, slots=True)
class Part:
    """One corpus of a mixture."""

    source: CorpusSource
    cfg: CorpusSchema
    weight: float


class Mixture(Corpus):
    """Named parts, each with a positive weight."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        """Raises GranaryError without parts, or for a weight that is not positive."""
        if not parts:
            raise GranaryError("corpus.parts is empty: give each part a name, a kind and a weight")
        for name, part in parts.items():
            if not part.weight > 0:
                raise GranaryError(f"corpus.parts.{name}.weight={part.weight}: it must be positive")
        self.parts = dict(parts)

    @property
    def description(self) -> str:
        total = sum(part.weight for part in self.parts.values())
        return "mixture: " + "; ".join(
            f"{part.weight / total:.3g} {part.source.description}" for part in self.parts.values()
        )

    def fingerprint(self) -> str:
        parts = [f"{name}\0{part.weight}\0{part.source.fingerprint()}" for name, part in self.parts.items()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def mix(self, streams: Mapping[str, Iterator[TokenIds]]) -> Iterator[TokenIds]:
        """The token ids of the documents of all parts, interleaved; ties go to the part named first."""
        taken = dict.fromkeys(streams, 0)
        while True:
            name = min(streams, key=lambda part: taken[part] / self.parts[part].weight)
            ids = next(streams[name], None)
            if ids is None:
                return
            taken[name] += ids.size
            yield ids
