"""The table of a multimodal store's images: which image, and which region of it, a position's `image` and `cell` mean.

One row per grid of cells of each image, as JSON lines, a part per shard. A row's number, over the whole store, is what
the array ``image`` holds. Shapes: S contexts, T positions.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from shared.basics.documents import typed_fields
from shared.basics.errors import GranaryError

MARKS_KIND = 7
"""Bits of a position's kind that say which of the kinds below it is of."""
PADDING, TEXT, SPECIAL, IMAGE, STRUCTURE = range(5)
"""What a position holds: nothing, text, a special token, a region of an image, and what stands around or between such
regions (marks, ends of rows, CLS)."""
ASSISTANT = 8
"""The bit of a position's kind that marks what the assistant said."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRow:
    """One grid of one image of one context. Coordinates are pixels of the image in RGB, upright, x to the right."""

    id: int
    """The row's number over the whole store."""
    context: int
    number: int
    """Which image of its context, from 0."""
    grid: int
    """Which of the image's grids, from 0: the whole image, then a mosaic of tiles where the model makes one."""
    sha256: str
    """Of the encoded bytes, under which the store keeps them."""
    row: str
    """File of the corpus and row or line of it."""
    path: str | None
    """What the corpus calls the image."""
    width: int
    height: int
    rows: int
    cols: int
    x: float
    """Left end of cell (0, 0); cell (r, c) has its upper left corner at (x + c * dx, y + r * dy)."""
    y: float
    dx: float
    dy: float

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise GranaryError("a row of the table of images names no SHA-256")

    def to_line(self) -> bytes:
        """One line of JSON."""
        return (json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n").encode()

    def box(self, row: int, col: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a cell, cut off at the image's edges."""
        left, top = self.x + col * self.dx, self.y + row * self.dy
        across, down = (lambda x: min(max(x, 0.0), self.width)), (lambda y: min(max(y, 0.0), self.height))
        return across(left), down(top), across(left + self.dx), down(top + self.dy)


def read_table(data: bytes, where: str) -> list[ImageRow]:
    """The rows of a part of the table; raises GranaryError naming `where` for what is none."""
    try:
        return [ImageRow(**typed_fields(ImageRow, json.loads(line), where)) for line in data.splitlines()]
    except (ValueError, TypeError, RecursionError) as error:
        raise GranaryError(f"{where} holds a line that is no row of it: {error}") from error


class TableParts(Protocol):
    """The lines of the table by contexts."""

    def __getitem__(self, contexts: slice) -> bytes:
        """The lines of these contexts, in order."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """What a multimodal store is made from beside its tokens; the arrays are anything sliceable."""

    kind: Any
    """uint8 [S, T]"""
    image: Any
    """int32 [S, T], row of the table, -1 for none"""
    cell: Any
    """int16 [S, T, 2], row and column in the grid, -1 for none"""
    table: TableParts
    data: Callable[[str], bytes]
    """The encoded bytes of the image of a SHA-256."""
