"""Texts to token ids, in worker processes that each run the tokenizer on one core.

Every batch's ids are kept in a file named by the hash of its texts and the tokenizer, until the store has its tokens: a
harvest that was killed while it tokenised reads those again and encodes the rest. Ids come in the order of the texts,
whatever the number of workers.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shared.basics.errors import GranaryError
from shared.basics.files import replacing
from stage_harvest.tokens.workers import Task, WorkerPool

MAX_WORKERS = 32  # more would wait for the one process that reads the documents
OWN_CHARACTERS = 400_000  # encoded in this process before any worker is started

TokenIds = npt.NDArray[np.int32]
Ids = TokenIds | Task[TokenIds]  # packed ids that are there, or are being made
T = TypeVar("T")


class Texts(NamedTuple):
    """A batch to encode."""

    strings: list[str]
    as_text: bool
    """A special token spelt out in a string is text."""


def default_workers() -> int:
    """One per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


class TextEncoder:
    """A context manager. A corpus's beginning is encoded in this process: a small one needs no workers."""

    def __init__(self, tokenizer: str, *, workers: int = 0, folder: Path | None = None) -> None:
        """`tokenizer` is serialised (``to_str``); 0 `workers`: encode here; `folder` keeps finished batches."""
        self.workers = workers
        self.folder = folder
        self.reused = 0
        """Batches that an earlier run left."""
        self._tokenizer = tokenizer
        self._salt = hashlib.sha256(tokenizer.encode()).digest()
        self._pool: WorkerPool | None = None

    def encode(self, batches: Iterable[tuple[T, Sequence[Texts]]]) -> Iterator[tuple[T, list[list[TokenIds]]]]:
        """The ids of each string of each set of texts of each batch, beside what the caller gave with the batch.

        Batches come back in order. Raises GranaryError when a worker or the disk gives out.
        """
        running: deque[tuple[T, list[Ids]]] = deque()
        characters = 0

        def finished() -> tuple[T, list[list[TokenIds]]]:
            given, made = running.popleft()
            return given, [from_array(ids.result() if isinstance(ids, Task) else ids) for ids in made]

        for given, sets in batches:
            in_worker = self.workers > 0 and characters > OWN_CHARACTERS
            characters += sum(len(string) for texts in sets for string in texts.strings)
            running.append((given, [self._start(texts, in_worker) for texts in sets]))
            if not in_worker or len(running) > self.workers + 1:
                yield finished()
        while running:
            yield finished()

    def _start(self, texts: Texts, in_worker: bool) -> Ids:
        if not texts.strings:
            return np.zeros(1, np.int32)
        digest = self._digest(texts)
        path = None if self.folder is None else self.folder / f"{digest}.npy"
        known = None if path is None else read_kept(path)
        if known is not None:
            self.reused += 1
            return known
        if in_worker:
            if self._pool is None:
                self._pool = WorkerPool(self.workers, _start_worker, self._tokenizer, _encode_in_worker)
            return self._pool.submit(texts, path)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        packed = to_array(self._own_tokenizer, texts)
        if path is not None:
            keep(path, packed)
        return packed

    @cached_property
    def _own_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self._tokenizer)

    def _digest(self, texts: Texts) -> str:
        digest = hashlib.blake2b(self._salt, digest_size=20)
        digest.update(b"text" if texts.as_text else b"special")
        for string in texts.strings:
            data = string.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()


def to_array(tokenizer: Tokenizer, texts: Texts) -> TokenIds:
    """Number of strings, the length of each one's ids, then all ids: one int32 array."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = texts.as_text
    # encode_batch_fast skips the character offsets, which nobody reads here.
    encoded = [e.ids for e in tokenizer.encode_batch_fast(texts.strings, add_special_tokens=False)]
    head = [len(encoded), *map(len, encoded)]
    return np.fromiter(itertools.chain(head, *encoded), np.int32, count=len(head) + sum(head[1:]))


def from_array(packed: TokenIds) -> list[TokenIds]:
    """Inverse of `to_array`: ids per string."""
    count = int(packed[0])
    if count == 0:
        return []
    ends = np.cumsum(packed[1 : count + 1])
    return np.split(packed[count + 1 :], ends[:-1])


def keep(path: Path, packed: TokenIds) -> None:
    """Write atomically: a file under its name is whole, also after a power cut. GranaryError if the disk refuses."""
    try:
        with replacing(path) as stream:
            np.save(stream, packed)
    except OSError as error:
        raise GranaryError(f"keeping token ids in {path.parent}: {error.strerror}; set spool_dir=...") from error


def read_kept(path: Path) -> TokenIds | None:
    """What `keep` wrote; None where there is nothing that can be used."""
    try:
        packed: TokenIds = np.load(path)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return packed


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer.from_str(tokenizer)


def _encode_in_worker(texts: Texts, path: Path | None) -> TokenIds:
    assert _worker_tokenizer is not None
    packed = to_array(_worker_tokenizer, texts)
    if path is not None:
        keep(path, packed)
    return packed
