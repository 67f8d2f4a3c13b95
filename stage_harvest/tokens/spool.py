"""Tokens on local disk until the store has them: packed contexts, and encoded documents for the run after a kill."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.basics.files import is_abandoned, lock_folder
from stage_harvest.tokens.packing import Context

FIELDS = (("tokens", np.int32), ("mask", np.bool_), ("segments", np.int32))


def folder_of(place: str, owner: str) -> Path:
    """Where the tokens for the store at the URL `owner` are spooled."""
    return Path(place) / f"spool-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"


def discard(place: str, owner: str) -> None:
    """Remove what a harvest that died had spooled for a store that has its tokens."""
    folder = folder_of(place, owner)
    if folder.exists() and is_abandoned(folder):
        shutil.rmtree(folder, ignore_errors=True)


class TokenSpool:
    """A folder with three growing files, memory-mapped as [S, T] once filled, and one for encoded documents.

    A context manager: leaving it without an error removes the folder; after an error the encoded documents stay for
    the next run.
    """

    def __init__(self, seq_len: int, place: str, owner: str) -> None:
        """The folder is made in `place`, under a name that `owner` (the store's URL) decides.

        Raises GranaryError if it can't be made, or if another process is using it.
        """
        self.seq_len = seq_len
        self.num_contexts = 0
        self.folder = folder_of(place, owner)
        self.encoded = self.folder / "encoded"
        """Where encoded documents are kept (see `stage_harvest.tokens.encoder`)."""
        self._packed = self.folder / "packed"
        try:
            self.encoded.mkdir(parents=True, exist_ok=True)
            held = lock_folder(self.folder)
        except OSError as error:
            raise GranaryError(f"no spool folder under {place}: {error.strerror}; set spool_dir=...") from error
        if held is None:
            raise GranaryError(f"another harvest is tokenising for {owner}: wait for it, or stop it")
        self._lock = held
        shutil.rmtree(self._packed, ignore_errors=True)
        self._packed.mkdir()

    def fill(self, contexts: Iterable[Context]) -> None:
        """Append all of `contexts`; raises GranaryError when the disk is full."""
        streams = [(self._packed / name).open("ab") for name, _ in FIELDS]
        try:
            for context in contexts:
                for stream, row in zip(streams, context, strict=True):
                    stream.write(row.tobytes())
                self.num_contexts += 1
            for stream in streams:
                stream.close()
        except OSError as error:
            raise GranaryError(f"spooling tokens to {self.folder}: {error.strerror}; set spool_dir=...") from error
        finally:
            for stream in streams:
                stream.close()

    def array(self, name: str) -> npt.NDArray[Any]:
        """``tokens``, ``mask`` or ``segments`` as a read-only [S, T] memory map."""
        return np.memmap(
            self._packed / name, dtype=dict(FIELDS)[name], mode="r", shape=(self.num_contexts, self.seq_len)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = error is not None and any(self.encoded.glob("*.npy"))
        shutil.rmtree(self._packed if keep else self.folder, ignore_errors=True)
        os.close(self._lock)
