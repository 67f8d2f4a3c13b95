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
from shared.store.format import layout
from shared.store.format.image_table import Pictures
from stage_harvest.tokens.packing import Context
from stage_harvest.tokens.pictured import PicturedContext

ARRAYS = ("tokens", "mask", "segments")
PICTURED_ARRAYS = (*ARRAYS, "kind", "image", "cell")


def folder_of(place: str, owner: str) -> Path:
    """Where the tokens for the store at the URL `owner` are spooled."""
    return Path(place) / f"spool-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"


def discard(place: str, owner: str) -> None:
    """Remove what a harvest that died had spooled for a store that has its tokens."""
    folder = folder_of(place, owner)
    if folder.exists() and is_abandoned(folder):
        shutil.rmtree(folder, ignore_errors=True)


class SpooledImages:
    """A folder of encoded images, each once, under its SHA-256, and the lines of their table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._ends = [0]  # where the lines of each context end
        self._table = folder / "table.jsonl"
        self._table.touch()

    def add(self, context: PicturedContext) -> None:
        """Append what a context shows."""
        for image in context.images:
            place = self.folder / image.sha256
            if not place.exists():
                place.write_bytes(image.data)
        lines = b"".join(row.to_line() for row in context.rows)
        with self._table.open("ab") as stream:
            stream.write(lines)
        self._ends.append(self._ends[-1] + len(lines))

    def __getitem__(self, contexts: slice) -> bytes:
        with self._table.open("rb") as stream:
            stream.seek(self._ends[contexts.start])
            return stream.read(self._ends[contexts.stop] - self._ends[contexts.start])

    def data(self, sha256: str) -> bytes:
        """The encoded bytes of an image."""
        return (self.folder / sha256).read_bytes()


class TokenSpool:
    """A folder with a growing file per array, memory-mapped as [S, T] once filled, and one for encoded documents.

    A context manager: leaving it without an error removes the folder; after an error the encoded documents stay for
    the next run.
    """

    def __init__(self, seq_len: int, place: str, owner: str, *, pictured: bool = False) -> None:
        """The folder is made in `place`, under a name that `owner` (the store's URL) decides; `pictured`: contexts have
        images.

        Raises GranaryError if it can't be made, or if another process is using it.
        """
        self.seq_len = seq_len
        self.num_contexts = 0
        self.names = PICTURED_ARRAYS if pictured else ARRAYS
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
        self.images = SpooledImages(self._packed / "images") if pictured else None

    def fill(self, contexts: Iterable[Context | PicturedContext]) -> None:
        """Append all of `contexts`; raises GranaryError when the disk is full."""
        streams = [(self._packed / name).open("ab") for name in self.names]
        try:
            for context in contexts:
                for stream, row in zip(streams, context[: len(streams)], strict=True):
                    stream.write(np.asarray(row).tobytes())
                if self.images is not None:
                    assert isinstance(context, PicturedContext)
                    self.images.add(context)
                self.num_contexts += 1
            for stream in streams:
                stream.close()
        except OSError as error:
            raise GranaryError(f"spooling tokens to {self.folder}: {error.strerror}; set spool_dir=...") from error
        finally:
            for stream in streams:
                stream.close()

    def array(self, name: str) -> npt.NDArray[Any]:
        """One of `names` as a read-only memory map [S, T], of cells [S, T, 2]."""
        array = (layout.TOKEN_ARRAYS | layout.IMAGE_ARRAYS)[name]
        shape = (self.num_contexts, self.seq_len, *array.beyond)
        return np.memmap(self._packed / name, dtype=array.numpy, mode="r", shape=shape)

    def pictures(self) -> Pictures | None:
        """What `Store.create` takes of the images; None where the contexts have none."""
        if self.images is None:
            return None
        kind, image, cell = (self.array(name) for name in PICTURED_ARRAYS[len(ARRAYS) :])
        return Pictures(kind, image, cell, self.images, self.images.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = error is not None and any(self.encoded.glob("*.npy"))
        shutil.rmtree(self._packed if keep else self.folder, ignore_errors=True)
        os.close(self._lock)
