"""A latents folder, open: what each latent of a dictionary does, from one pass over a store.

latents = Latents.open("runs/demo/latents")
latents.table["fired"]            # a column over all latents
for example in latents.top(1234): print(example.value, example.marked)
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.latents import layout
from shared.latents.arrays import READ_THREADS, ArrayReader, ChunkCache
from shared.latents.examples import DECILES, Example, Records, WindowTable, decile
from shared.latents.meta import Meta
from shared.latents.notes import Explanation, Found, Notes
from shared.latents.pictures import PictureTable, SeenPicture
from shared.latents.table import Table, read_table
from shared.latents.vocabulary import Vocabulary
from shared.store.io.base import ObjectIO
from shared.store.io.open import open_io


@dataclass(frozen=True, slots=True)
class Related:
    """A latent beside another, and by how much."""

    latent: int
    value: float
    count: int | None = None
    """Tokens of the sample in which both fired."""


@dataclass(frozen=True, slots=True)
class TokenShare:
    """A token that a latent fires on, or that follows one."""

    token: int
    text: str
    count: int
    """How often among the sampled firing tokens."""
    share: float


@dataclass(frozen=True, slots=True)
class LogitWeight:
    """What firing adds to a token's logit, per unit of activation and of the final norm's RMS."""

    token: int
    text: str
    value: float


@dataclass(frozen=True)
class Latent:
    """All that is known of one latent, but its examples."""

    index: int
    numbers: Mapping[str, float]
    """Its row of the table."""
    histogram: npt.NDArray[np.uint64]
    """Firing tokens per bin of log2 of the activation; `Latents.histogram_edges` has the edges."""
    positions: npt.NDArray[np.uint64]
    """Firing tokens per group of positions, whose first positions are ``meta.position_edges``."""
    tokens: list[TokenShare]
    next_tokens: list[TokenShare]
    promoted: list[LogitWeight]
    """Tokens whose logits it raises most; empty without a language model."""
    demoted: list[LogitWeight]
    logit_histogram: npt.NDArray[np.uint32] | None
    """Over the vocabulary, between the numbers ``logit_low`` and ``logit_high``."""
    jaccard: list[Related]
    """Latents that fire on the same tokens."""
    npmi: list[Related]
    pearson: list[Related]
    explanations: list[Explanation]
    labels: list[str]
    note: str


class Latents:
    """A latents folder at a local path or any fsspec URL. Safe to use from several threads."""

    def __init__(self, io: ObjectIO, meta: Meta) -> None:
        """Use `open`."""
        self.io, self.meta = io, meta
        self._cache = ChunkCache()
        self._arrays: dict[str, ArrayReader] = {}

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Self:
        """Raises GranaryError where there is no finished latents folder."""
        io = open_io(url)
        return cls(io, Meta.read(io))

    @property
    def url(self) -> str:
        return self.io.url

    @property
    def num_latents(self) -> int:
        return self.meta.num_latents

    def array(self, path: str) -> ArrayReader:
        """One of the folder's arrays, see `shared.latents.layout`; raises GranaryError where it lacks this one."""
        if path not in self._arrays:
            if self.io.size(f"{path}/zarr.json") is None:
                raise GranaryError(f"the latents folder at {self.url} has no {path}")
            spec = layout.ARRAYS[path]
            self._arrays[path] = ArrayReader(self.io, path, spec, spec.row_shape(self.meta.axes), self._cache)
        return self._arrays[path]

    def has(self, path: str) -> bool:
        """Whether an array is there; those of `layout.OPTIONAL` may not be."""
        return path in self._arrays or self.io.size(f"{path}/zarr.json") is not None

    @cached_property
    def table(self) -> Table:
        """A column [F] for each number of a latent, by name."""
        return self._rows_of_table(range(self.num_latents))

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The bytes of the tokens; None where the folder was made without the tokenizer."""
        if not self.has("vocabulary/offsets"):
            return None
        offsets, data, special = (self.array(f"vocabulary/{name}").all() for name in ("offsets", "bytes", "special"))
        if (
            len(offsets) != len(special) + 1
            or offsets[-1] != len(data)
            or (np.diff(offsets.astype(np.int64)) < 0).any()
        ):
            raise GranaryError(f"the vocabulary of {self.url} is damaged: run granary inspect again")
        return Vocabulary(offsets, data, special)

    @cached_property
    def notes(self) -> Notes:
        """Explanations, scores, notes, labels, lists."""
        return Notes.open(self.io)

    @cached_property
    def histogram_edges(self) -> npt.NDArray[np.float64]:
        """Edges [BINS + 1] of the histogram: the first 0, the last infinite."""
        inner = self.meta.histogram_origin + np.arange(layout.BINS - 1) / layout.BINS_PER_OCTAVE
        return np.concatenate([[0.0], np.exp2(inner), [np.inf]])

    def latent(self, index: int) -> Latent:
        """All numbers of one latent. Raises GranaryError for one that is not there."""
        self._check(index)
        sampled = int(self.array("tokens/sampled").row(index))
        # Of a table that nobody has asked for yet, one row: at a URL the whole is megabytes.
        table, row = (
            (self.table, index) if "table" in self.__dict__ else (self._rows_of_table(range(index, index + 1)), 0)
        )
        notes = self.notes
        return Latent(
            index=index,
            numbers={name: table[name][row].item() for name in table},
            histogram=self.array("histogram").row(index),
            positions=self.array("positions").row(index),
            tokens=self._tokens("tokens/firing", index, sampled),
            next_tokens=self._tokens("tokens/next", index, sampled),
            promoted=self._logits("logits/top", index),
            demoted=self._logits("logits/bottom", index),
            logit_histogram=self.array("logits/histogram").row(index) if self.has("logits/histogram") else None,
            jaccard=self._related("together/jaccard", index, counted=True),
            npmi=self._related("together/npmi", index, counted=True),
            pearson=self._related("together/pearson", index),
            explanations=notes.explanations(index),
            labels=notes.labels(index).get(index, []),
            note=notes.note(index),
        )

    def top(self, index: int, count: int | None = None, *, start: int = 0) -> list[Example]:
        """The strongest records, at most one of a document's part in a context; the strongest first."""
        records, num_top = self.records(index)
        stop = num_top if count is None else min(num_top, start + count)
        return self.examples(records.take(range(min(start, stop), stop)))

    def sample(self, index: int, *, quantile: int | None = None, count: int | None = None) -> list[Example]:
        """An unbiased sample of the windows it fired in, the strongest first; of a `quantile` 0 (strongest) to 9.

        Each of the ``windows`` windows is in the sample with the same chance. `count`: at even distances of it.
        """
        if quantile is not None and not 0 <= quantile < DECILES:
            raise GranaryError(f"quantile={quantile}: choose from 0 (the strongest tenth) to {DECILES - 1}")
        records, num_top = self.records(index)
        chosen = np.arange(num_top, len(records))
        if quantile is not None:
            chosen = chosen[decile(len(chosen), quantile)]
        if count is not None and count < len(chosen):
            chosen = chosen[np.arange(count) * len(chosen) // count]
        return self.examples(records.take(chosen))

    def silent(self, index: int, count: int = 5) -> list[Example]:
        """Windows of the shared pool in which the latent was seen to be silent; none for one that fires everywhere."""
        self._check(index)
        pool = self.array("silent/window").all()
        start, stop = (int(end) for end in self.array("silent/offsets").rows(index, index + 2))
        quiet = np.setdiff1d(np.arange(len(pool)), self.array("silent/fired").rows(start, stop))
        order = (quiet * 2654435761 + index * 40503) % 2**32  # another few of them for each latent
        chosen = pool[np.sort(quiet[np.argsort(order, kind="stable")[:count]])]
        nothing = np.zeros(len(chosen))
        records = Records(
            chosen,
            nothing.astype(np.uint16),
            nothing.astype(np.float32),
            nothing.astype(np.uint8),
            np.empty(0, np.int8),
            np.empty(0, np.float16),
        )
        return self._windows.examples(records, self.vocabulary, within_window=True)

    @property
    def has_pictures(self) -> bool:
        """Whether the folder was made of a multimodal store."""
        return self.has("seen/offsets")

    def pictures(self, index: int, count: int | None = None, *, start: int = 0) -> list[SeenPicture]:
        """The pictures (one image of one document each) on which the latent fires most, the strongest first.

        Raises GranaryError where the folder is of a store of text, or damaged.
        """
        self._check(index)
        stop = None if count is None else start + count
        return self._picture_table.of(index, start, stop, self.vocabulary)

    def thumbnail(self, digest: str) -> bytes:
        """A picture by its `SeenPicture.thumbnail`: WebP of at most 256 pixels a side. Raises GranaryError."""
        return self._picture_table.thumbnail(digest)

    def neighbours(self, index: int) -> list[Related]:
        """Latents whose decoder directions are nearest by cosine; the nearest first."""
        self._check(index)
        if not self.has("neighbours/latent"):
            return []
        return self._pairs(self.array("neighbours/latent").row(index), self.array("neighbours/cosine").row(index))

    def search(self, text: str, limit: int = 100) -> list[Found]:
        """Latents whose explanations or notes hold these words."""
        return self.notes.search(text, limit)

    def find(self, *, token: str | int, limit: int = 50) -> list[Related]:
        """Latents that fire on a token, given as its id or its text; the larger part of their firing, the earlier.

        The value is the share of the latent's sampled firing tokens that are this one. Raises GranaryError for a text
        that is no token.
        """
        wanted = [token] if isinstance(token, int) else self.vocabulary.find(token) if self.vocabulary else []
        if not wanted:
            raise GranaryError(f"{token!r} is no token of the vocabulary: give one token's text, or its id")
        listed, counts = self._firing
        hits = np.where(np.isin(listed, wanted), counts, 0).sum(1)
        found = np.flatnonzero(hits)
        share = hits[found] / np.maximum(self.array("tokens/sampled").all()[found], 1)
        order = np.lexsort((found, -hits[found], -share))[:limit]
        return [Related(int(found[i]), float(share[i]), int(hits[found[i]])) for i in order]

    def records(self, index: int) -> tuple[Records, int]:
        """All records of a latent, and how many of them, at the front, are its strongest."""
        self._check(index)
        start, stop = (int(end) for end in self.array("examples/offsets").rows(index, index + 2))
        first, last = (int(end) for end in self.array("examples/active_offsets").rows(index, index + 2))
        records = Records(
            *(self.array(f"examples/{name}").rows(start, stop) for name in ("window", "position", "value", "active")),
            *(self.array(f"active/{name}").rows(first, last) for name in ("offset", "share")),
        )
        if len(records) != stop - start or int(records.active.sum()) != len(records.offset):
            raise GranaryError(f"the examples of latent {index} in {self.url} are damaged: run granary inspect again")
        return records, int(self.array("examples/top").row(index))

    def examples(self, records: Records, *, within_window: bool = False) -> list[Example]:
        """Records with their text: what is around each peak, or the peak's own window."""
        return self._windows.examples(records, self.vocabulary, within_window=within_window)

    @cached_property
    def _picture_table(self) -> PictureTable:
        return PictureTable(self.io, self.array, self.meta.seq_len)

    @cached_property
    def _windows(self) -> WindowTable:
        settings = self.meta.settings
        start, segment, tokens = (self.array(f"windows/{name}") for name in ("start", "segment", "tokens"))
        names = ("kind", "image", "cell") if self.has_pictures else ()
        held = {name: self.array(f"windows/{name}") for name in names}
        return WindowTable(start, segment, tokens, self.meta.seq_len, settings["before"], settings["after"], held)

    def _rows_of_table(self, latents: range) -> Table:
        """Rows of these neighbours; columns side by side, since each is a request of its own."""

        def read(path: str) -> npt.NDArray[np.generic] | None:
            return self.array(path).rows(latents.start, latents.stop) if self.has(path) else None

        paths = [path for path in layout.ARRAYS if path.startswith("table/")]
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="granary-latents") as pool:
            columns = dict(zip(paths, pool.map(read, paths), strict=True))
        return read_table(self.meta, latents, columns.get)

    @cached_property
    def _firing(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]:
        return self.array("tokens/firing").all(), self.array("tokens/firing_count").all()

    def _tokens(self, path: str, index: int, sampled: int) -> list[TokenShare]:
        tokens, counts = self.array(path).row(index), self.array(f"{path}_count").row(index)
        return [
            TokenShare(token, self._text(token), count, count / max(sampled, 1))
            for token, count in zip(tokens.tolist(), counts.tolist(), strict=True)
            if token != layout.NONE
        ]

    def _logits(self, path: str, index: int) -> list[LogitWeight]:
        if not self.has(path):
            return []
        tokens, values = self.array(path).row(index), self.array(f"{path}_value").row(index)
        return [
            LogitWeight(token, self._text(token), value)
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
            if token != layout.NONE
        ]

    def _related(self, path: str, index: int, *, counted: bool = False) -> list[Related]:
        counts = self.array(f"{path}_count").row(index) if counted else None
        return self._pairs(self.array(f"{path}_latent").row(index), self.array(path).row(index), counts)

    def _pairs(
        self,
        latents: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        counts: npt.NDArray[np.uint32] | None = None,
    ) -> list[Related]:
        numbers: Sequence[int | None] = counts.tolist() if counts is not None else [None] * len(latents)
        return [
            Related(latent, value, count)
            for latent, value, count in zip(latents.tolist(), values.tolist(), numbers, strict=True)
            if latent != layout.NONE
        ]

    def _text(self, token: int) -> str:
        return self.vocabulary.text_of(token) if self.vocabulary is not None else f"<token {token}>"

    def _check(self, index: int) -> None:
        if not 0 <= index < self.num_latents:
            raise GranaryError(f"latent {index} is not there: {self.url} has latents 0 to {self.num_latents - 1}")
