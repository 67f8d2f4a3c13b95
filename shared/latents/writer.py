"""Writing a latents folder: arrays by appending rows, then the groups around them, then ``meta.json``.

A folder that has no ``meta.json`` does not count; one that is written anew loses it first. Notes are never touched.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shared.latents.arrays import ArrayWriter
from shared.latents.layout import ARRAYS, META, OPTIONAL, THUMBNAILS
from shared.latents.meta import Meta
from shared.latents.vocabulary import Vocabulary
from shared.store.format.metadata import group_document
from shared.store.io.base import ObjectIO

Rows = npt.NDArray[Any]


class LatentsWriter:
    """Fills one folder. Every array of the format that is not optional must be given."""

    def __init__(self, io: ObjectIO, axes: dict[str, int]) -> None:
        self.io, self.axes = io, axes
        self._writers: dict[str, ArrayWriter] = {}

    @classmethod
    def begin(cls, io: ObjectIO, axes: dict[str, int]) -> Self:
        """Start a folder, or start it again: what arrays it had are removed, ``meta.json`` first."""
        io.delete(META)
        tops = {path.partition("/")[0] for path in ARRAYS} | {"zarr.json", THUMBNAILS}
        for key in io.listing():
            if key.partition("/")[0] in tops:
                io.delete(key)
        return cls(io, axes)

    def append(self, path: str, rows: Rows) -> None:
        """Rows to an array of the format."""
        if path not in self._writers:
            spec = ARRAYS[path]
            self._writers[path] = ArrayWriter(self.io, path, spec, spec.row_shape(self.axes))
        self._writers[path].append(rows)

    def append_all(self, rows: Mapping[str, Rows]) -> None:
        """Rows to several arrays."""
        for path, part in rows.items():
            self.append(path, part)

    def vocabulary(self, vocabulary: Vocabulary) -> None:
        """The tokens' bytes."""
        self.append("vocabulary/offsets", vocabulary.offsets)
        self.append("vocabulary/bytes", vocabulary.data)
        self.append("vocabulary/special", vocabulary.special)

    def thumbnail(self, data: bytes) -> bytes:
        """Keep a picture as it is shown; returns the SHA-256 it lies under. The same bytes lie there once."""
        digest = hashlib.sha256(data)
        self.io.put(f"{THUMBNAILS}/{digest.hexdigest()}", [data])
        return digest.digest()

    def finish(self, meta: Meta) -> None:
        """Write what is left, and ``meta.json`` last."""
        for path in ARRAYS.keys() - OPTIONAL - self._writers.keys():
            self.append(path, np.empty((0, *ARRAYS[path].row_shape(self.axes)), ARRAYS[path].dtype))
        for writer in self._writers.values():
            writer.close()
        for group in sorted({path.rpartition("/")[0] for path in self._writers if "/" in path}):
            self.io.put(f"{group}/zarr.json", [group_document({}).encode()], replace=True)
        self.io.put("zarr.json", [group_document({"granary": "latents"}).encode()], replace=True)
        self.io.put(META, [meta.to_bytes()], replace=True)
