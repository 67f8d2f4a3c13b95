"""Texts to token ids, in worker processes that each run the tokenizer on one core.

Every batch's ids are kept in a file named by the hash of its texts and the tokenizer, until the store has its tokens: a
harvest that was killed while it tokenised reads those again and encodes the rest. Ids come in the order of the texts,
whatever the number of workers.
"""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from shared.basics.errors import GranaryError
from shared.basics.files import replacing

MAX_WORKERS = 32  # more would wait for the one process that reads the documents
OWN_CHARACTERS = 400_000  # encoded in this process before any worker is started

TokenIds = npt.NDArray[np.int32]


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
        self._pool: ProcessPoolExecutor | None = None

    def encode(self, batches: Iterable[Texts]) -> Iterator[list[TokenIds]]:
        """The ids of each string of each batch, in order. Raises GranaryError when a worker or the disk gives out."""
        running: deque[Future[TokenIds]] = deque()
        characters = 0
        try:
            for texts in batches:
                in_worker = self.workers > 0 and characters > OWN_CHARACTERS
                characters += sum(map(len, texts.strings))
                running.append(self._start(texts, in_worker))
                if not in_worker or len(running) > 2 * (self.workers + 1):
                    yield split_packed(running.popleft().result())
            while running:
                yield split_packed(running.popleft().result())
        except BrokenProcessPool as error:
            raise GranaryError(
                "a tokenising process was killed, perhaps for lack of memory: run again with fewer tokenise_workers"
            ) from error

    def _start(self, texts: Texts, in_worker: bool) -> Future[TokenIds]:
        done: Future[TokenIds] = Future()
        if not texts.strings:
            done.set_result(np.zeros(1, np.int32))
            return done
        digest = self._digest(texts)
        path = None if self.folder is None else self.folder / f"{digest}.npy"
        known = None if path is None else read_kept(path)
        if known is not None:
            self.reused += 1
            done.set_result(known)
            return done
        if in_worker:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(
                    self.workers, multiprocessing.get_context("spawn"), _start_worker, (self._tokenizer,)
                )
            return self._pool.submit(_encode_in_worker, texts, path)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        packed = encode_packed(self._own_tokenizer, texts)
        if path is not None:
            keep(path, packed)
        done.set_result(packed)
        return done

    @cached_property
    def _own_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self._tokenizer)

    def _digest(self, texts: Texts) -> str:
        digest = hashlib.blake2b(self._salt, digest_size=20)
        digest.update(b"text" if texts.as_text else b"special")
        for string in texts.strings:
            try:
                data = string.encode()
            except UnicodeEncodeError as error:
                where = repr(string[max(error.start - 20, 0) : error.end])
                raise GranaryError(
                    f"a document holds half of a surrogate pair, which is no text, at character {error.start}: {where}"
                ) from error
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def encode_packed(tokenizer: Tokenizer, texts: Texts) -> TokenIds:
    """Number of strings, the length of each one's ids, then all ids: one int32 array."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = texts.as_text
    # encode_batch_fast skips the character offsets, which nobody reads here.
    encoded = [e.ids for e in tokenizer.encode_batch_fast(texts.strings, add_special_tokens=False)]
    head = [len(encoded), *map(len, encoded)]
    return np.fromiter(itertools.chain(head, *encoded), np.int32, count=len(head) + sum(head[1:]))


def split_packed(packed: TokenIds) -> list[TokenIds]:
    """Inverse of `encode_packed`: ids per string."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer.from_str(tokenizer)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent killed by SIGKILL closes nothing that its workers would notice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: Texts, path: Path | None) -> TokenIds:
    assert _worker_tokenizer is not None
    packed = encode_packed(_worker_tokenizer, texts)
    if path is not None:
        keep(path, packed)
    return packed
