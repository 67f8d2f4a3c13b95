"""One pass over the store's contexts with the dictionary, counting every latent on every concept at once.

The first half of it chooses the latents, the second scores them. A document is in one of the halves: one that reaches
into contexts of both counts in the first alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.latents.layout import BINS
from shared.latents.vocabulary import Vocabulary
from shared.sae.for_store import DictionaryFolder, open_folder
from shared.store import Store
from shared.text.documents import documents
from stage_inspect.concepts.labels import Concepts
from stage_inspect.concepts.score import Detail, Marks, Match, Tally, choose, score
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.pairs import Ints, Pairs, bins

TALLY_BYTES = 3 << 30  # of the counts on which latents are chosen
DETAIL_BYTES = 1 << 28  # of those on which they are scored, by documents or groups of them
LEAST_UNITS, MOST_UNITS = 32, 1024
AT_ONCE = 64  # contexts whose documents are labelled together
CHOOSING, SCORING = (f"no token of the half that {what} is an example" for what in ("chooses", "scores"))


@dataclass(frozen=True)
class Inspected:
    """A latents folder with the store and the dictionary that it was made of."""

    latents: Latents
    store: Store
    folder: DictionaryFolder

    @classmethod
    def open(cls, latents: Latents, sae: str | None, store: str | None) -> "Inspected":
        """Raises GranaryError where either is not there, or not the one that the folder was made of."""
        meta = latents.meta
        opened = Store.open(store or meta.store["url"])
        reads, writes = meta.dictionary["reads"], meta.dictionary["writes"]
        hook = reads[0] if reads == writes and len(reads) == 1 else None
        folder = open_folder(sae or str(meta.dictionary.get("path")), opened, hook)
        if folder.sha256() != meta.dictionary["sha256"]:
            raise GranaryError(f"{folder.path} is not the dictionary that {latents.url} was made of: give --sae")
        if opened.plan.hash() != meta.store.get("plan_hash"):
            raise GranaryError(f"{opened.url} is not the store that {latents.url} was made of: give --store")
        return cls(latents, opened, folder)

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of the tokens. Raises GranaryError where the folder was made without them."""
        if self.latents.vocabulary is None:
            raise GranaryError(f"{self.latents.url} has no vocabulary: inspect again where the model's tokenizer is")
        return self.latents.vocabulary


@dataclass(frozen=True)
class Result:
    """What a search found."""

    matches: dict[str, list[Match]]
    """Of each concept, those that fit it best first."""
    left_out: dict[str, str]
    """Concepts that could not be looked for, and why."""
    documents: tuple[int, int]
    """Documents of which latents were chosen, and on which they were scored."""


def search(inspected: Inspected, concepts: Concepts, contexts: Ints, count: int, tell: Callable[[int], None]) -> Result:
    """The best latents of each concept, over these contexts; raises GranaryError where none can be looked for."""
    F = inspected.latents.meta.num_latents
    names, scopes = concepts.names, concepts.scopes
    cells = (len(names) + 1 + max(scopes)) * F * BINS
    if 4 * cells > TALLY_BYTES:
        most = TALLY_BYTES // (4 * F * BINS) - 2
        raise GranaryError(f"{len(names)} concepts at once are too many for {F:,} latents: look for {most} at a time")
    choosing, scoring = halves(contexts)
    reading = Reading(inspected, concepts, tell)
    tally = Tally.empty(len(names), 1 + max(scopes), F)
    for part in reading.of(choosing):
        tally.yes_C += (part.marks_CN & part.inside_SN[scopes]).sum(1)
        tally.add(part.latent, part.bin, part.marks_CP & part.inside_SP[scopes], part.inside_SP)
    chosen_from = len(reading.seen)
    chosen = [choose(tally, number, scope, count) for number, scope in enumerate(scopes)]
    absent = {name: CHOOSING for name, examples in zip(names, tally.yes_C, strict=True) if not examples}
    units = int(np.clip(DETAIL_BYTES // (8 * len(names) * max(1, count) * BINS), LEAST_UNITS, MOST_UNITS))
    detail = Detail(chosen, scopes, units, F)
    reading.leave_out(choosing)
    for part in reading.of(scoring):
        detail.add_tokens(part.document_N % units, part.marks_CN, part.inside_SN)
        detail.add(part.latent, part.bin, part.document_P % units, part.marks_CP, part.inside_SP)
    for name, examples in zip(names, detail.examples_CU.sum(1), strict=True):
        if not examples:
            absent.setdefault(name, SCORING)
    if len(absent) == len(names):
        told = "; ".join(f"{name}: {why}" for name, why in absent.items())
        raise GranaryError(f"there is nothing to look for: {told}: give --split all, or more --contexts")
    matches = {name: score(detail, number) for number, name in enumerate(names) if name not in absent}
    return Result(matches, absent, (chosen_from, len(reading.seen)))


@dataclass(frozen=True)
class Part:
    """Tokens [N] of some contexts that count, and the pairs [P] of them with latents that fire."""

    document_N: Ints
    """Number of the document, in the order in which they are met."""
    marks_CN: Marks
    inside_SN: Marks
    latent: Ints
    bin: Ints
    document_P: Ints
    marks_CP: Marks
    inside_SP: Marks


class Reading:
    """Reads contexts, labels their documents and encodes them."""

    def __init__(self, inspected: Inspected, concepts: Concepts, tell: Callable[[int], None]) -> None:
        self._inspected, self._concepts, self._tell = inspected, concepts, tell
        store = inspected.store
        dictionary = inspected.folder.load(torch.device("cpu"))
        self._reader = BatchReader(
            store, dictionary, inspected.folder.sites, inspected.latents.meta.window, store.isolated
        )
        self._left_out = np.zeros(store.num_contexts, bool)
        self.seen: dict[int, int] = {}
        """Number of each document that was met since `leave_out`, by the place of its first token."""

    def leave_out(self, pieces: list[Ints]) -> None:
        """Documents that reach into these contexts do not count any more."""
        for piece in pieces:
            self._left_out[piece] = True
        self.seen = {}

    def of(self, pieces: list[Ints]) -> Iterator[Part]:
        """Pieces, runs of neighbours, in their order."""
        store, meta = self._inspected.store, self._inspected.latents.meta
        names, T, F = self._concepts.names, store.seq_len, meta.num_latents
        for piece in pieces:
            first = int(piece[0]) * T
            marks = np.zeros((len(names), len(piece) * T), bool)
            inside = np.zeros((1 + max(self._concepts.scopes), len(piece) * T), bool)
            number = np.zeros(len(piece) * T, np.int64)
            for document in documents(store, piece, self._inspected.vocabulary):
                if self._left_out[np.unique(document.places // T)].any():
                    continue
                here = (document.places >= first) & (document.places < first + len(number))
                at = document.places[here] - first
                marked, scope = self._concepts.mark(document)
                marks[:, at], inside[:, at] = marked[:, here], scope[:, here]
                number[at] = self.seen.setdefault(int(document.places[0]), len(self.seen))
            for batch in self._reader.batches(piece):
                places = batch.places.place_P - first
                trained = places[batch.at_N]
                pairs = Pairs.of(batch.at_N, batch.indices_NK, batch.values_NK, F)
                where = places[pairs.at]
                bin_ = bins(pairs.value, meta.histogram_origin)
                yield Part(
                    number[trained], marks[:, trained], inside[:, trained], pairs.latent, bin_, number[where],
                    marks[:, where], inside[:, where],
                )  # fmt: skip
                self._tell(len(places))


def halves(contexts: Ints) -> tuple[list[Ints], list[Ints]]:
    """Contexts in runs of neighbours, those to choose on and those to score on, about as many of each.

    Long runs, so that few documents reach into both. Raises GranaryError for one context alone.
    """
    if len(contexts) < 2:
        raise GranaryError("latents are chosen on one half of the contexts and scored on the other: give two at least")
    size = min(AT_ONCE, -(-len(contexts) // 2))
    runs = np.split(contexts, np.flatnonzero(np.diff(contexts) != 1) + 1)
    sides: tuple[list[Ints], list[Ints]] = ([], [])
    sizes = [0, 0]
    for piece in (run[start : start + size] for run in runs for start in range(0, len(run), size)):
        side = int(sizes[1] < sizes[0])
        sides[side].append(piece)
        sizes[side] += len(piece)
    return sides
