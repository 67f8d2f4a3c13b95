"""The images of a multimodal store: what each position holds, which region of which image, and the image itself.

Shapes: n contexts asked for, T positions.
"""

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.store.format import layout
from shared.store.format.image_table import ASSISTANT, IMAGE, MARKS_KIND, TEXT, ImageRow, read_table
from shared.store.format.manifest import DamagedObjectError
from shared.store.io.base import ObjectIO

PARTS_HELD = 64


def of_kinds(kind: npt.NDArray[np.uint8], kinds: Collection[str]) -> npt.NDArray[np.bool_]:
    """Whether each position is of one of `kinds` (text, image, assistant)."""
    base, chosen = kind & MARKS_KIND, np.zeros(kind.shape, bool)
    if "text" in kinds:
        chosen |= base == TEXT
    if "image" in kinds:
        chosen |= base == IMAGE
    if "assistant" in kinds:
        chosen |= (kind & ASSISTANT) > 0
    return chosen


class StoredPictures:
    """The images of one store. All methods may be called from several threads."""

    def __init__(
        self,
        io: ObjectIO,
        provenance: Mapping[str, Any],
        token_rows: Callable[[str, Iterable[int]], npt.NDArray[Any]],
        shard_of: Callable[[int], int],
    ) -> None:
        """`provenance` is that of the store's plan; `token_rows` and `shard_of` are the store's."""
        self.url, self._io, self._provenance = io.url, io, provenance
        self._token_rows, self._shard_of = token_rows, shard_of
        self._lock = threading.Lock()
        self._parts: dict[int, list[ImageRow]] = {}

    def kind(self, contexts: Iterable[int]) -> npt.NDArray[np.uint8]:
        """What each position holds, [n, T]: see `shared.store.format.image_table`."""
        return self._token_rows(layout.KIND, contexts)

    def chosen(self, contexts: Iterable[int], kinds: Collection[str]) -> npt.NDArray[np.bool_]:
        """Whether each position is of one of `kinds` (text, image, assistant), bool [n, T].

        Raises GranaryError for assistant where the harvest did not mark it.
        """
        if "assistant" in kinds and not self._provenance[layout.IMAGES].get("assistant"):
            raise GranaryError(
                f"the store at {self.url} does not mark what the assistant said: harvest it with a chat template"
                " that has {% generation %} tags"
            )
        return of_kinds(self.kind(contexts), kinds)

    def image(self, contexts: Iterable[int]) -> npt.NDArray[np.int32]:
        """The row of the table of images that a position's region is in, [n, T]; -1 for none."""
        return self._token_rows(layout.IMAGE, contexts)

    def cell(self, contexts: Iterable[int]) -> npt.NDArray[np.int16]:
        """Row and column of the region in its grid, [n, T, 2]; -1 for none."""
        return self._token_rows(layout.CELL, contexts)

    def table(self, shard: int) -> list[ImageRow]:
        """The rows of the table for the contexts of a shard, by their numbers."""
        with self._lock:
            known = self._parts.get(shard)
        if known is not None:
            return known
        key = layout.image_table_key(shard)
        rows = read_table(self._io.get(key), f"{self.url}/{key}")
        with self._lock:
            if len(self._parts) >= PARTS_HELD:
                self._parts.clear()
            self._parts[shard] = rows
        return rows

    def rows_of(self, context: int) -> list[ImageRow]:
        """The rows of the table for one context."""
        return [row for row in self.table(self._shard_of(context)) if row.context == context]

    def data(self, sha256: str) -> bytes:
        """The encoded bytes of an image; raises DamagedObjectError where they are not those of that hash."""
        key = layout.image_file_key(sha256)
        data = self._io.get(key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedObjectError(f"{self.url}: {key} fails its checksum", key=key)
        return data
