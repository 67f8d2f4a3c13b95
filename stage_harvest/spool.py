"""Packed contexts on local disk, until their number is known and the store can be made."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shared.errors import GranaryError
from stage_harvest.packing import Context

FIELDS = (("tokens", np.int32), ("mask", np.bool_), ("segments", np.int32))


class Spool:
    """A temporary folder with three growing files; memory-mapped as [S, T] once filled. A context manager."""

    def __init__(self, seq_len: int, folder: str | None = None) -> None:
        """`folder` is where the temporary folder is made (None: the system's); GranaryError if it can't be."""
        self.seq_len = seq_len
        self.num_contexts = 0
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="granary-spool-", dir=folder))
        except OSError as error:
            raise GranaryError(f"no spool folder under {folder or tempfile.gettempdir()}: {error.strerror}") from error

    def fill(self, contexts: Iterable[Context]) -> None:
        """Append all of `contexts`; raises GranaryError when the disk is full."""
        streams = [(self._folder / name).open("ab") for name, _ in FIELDS]
        try:
            for context in contexts:
                for stream, row in zip(streams, context, strict=True):
                    stream.write(row.tobytes())
                self.num_contexts += 1
            for stream in streams:
                stream.close()
        except OSError as error:
            raise GranaryError(f"spooling tokens to {self._folder}: {error.strerror}; set spool_dir=...") from error
        finally:
            for stream in streams:
                stream.close()

    def array(self, name: str) -> npt.NDArray[Any]:
        """``tokens``, ``mask`` or ``segments`` as a read-only [S, T] memory map."""
        return np.memmap(
            self._folder / name, dtype=dict(FIELDS)[name], mode="r", shape=(self.num_contexts, self.seq_len)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
