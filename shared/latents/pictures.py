"""Pictures that a latent fires on: one image of one document each, with the activation of every region of it.

C regions on which the latent fires.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.basics.images import MOST_PIXELS, is_thumbnail
from shared.latents.arrays import ArrayReader
from shared.latents.layout import NONE, THUMBNAILS
from shared.latents.vocabulary import Vocabulary
from shared.store.io.base import ObjectIO, ObjectMissingError

MOST_CELLS = 1 << 14  # along a side of a grid
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Grid:
    """Equal cells over an image: cell (r, c) begins at (x + c dx, y + r dy), in pixels of the upright image."""

    row: int
    """Row of the store's table of images."""
    rows: int
    cols: int
    x: float
    y: float
    dx: float
    dy: float

    def __post_init__(self) -> None:
        place = (self.x, self.y, self.dx, self.dy)
        is_sound = np.isfinite(place).all() and min(self.dx, self.dy) > 0 and np.abs(place).max() <= MOST_PIXELS
        if not is_sound or not all(1 <= side <= MOST_CELLS for side in (self.rows, self.cols)):
            raise ValueError("a grid of no image")


@dataclass(frozen=True, slots=True)
class SeenPicture:
    """An image of a document as one latent sees it."""

    value: float
    """The largest activation of its regions, exact; the others have 11 bits."""
    context: int
    position: int
    """Of its first region within the context."""
    sha256: str
    """Of the image's encoded bytes, under which the store keeps it."""
    thumbnail: str
    """SHA-256 of what `Latents.thumbnail` gives."""
    width: int
    height: int
    grids: list[Grid]
    grid: npt.NDArray[np.int64]
    """Which of `grids` a region is in [C]."""
    cell: npt.NDArray[np.int16]
    """Row and column there [C, 2]."""
    values: npt.NDArray[np.float32]
    """Activations [C]; where the latent is silent there is no entry."""
    before: npt.NDArray[np.int32]
    """Tokens of the document's text before the picture, as many as a window holds."""
    after: npt.NDArray[np.int32]
    """Those behind it."""
    vocabulary: Vocabulary | None = None

    @property
    def peak(self) -> int:
        """Which of the regions has the largest activation."""
        return int(self.values.argmax())

    @property
    def boxes(self) -> npt.NDArray[np.float64]:
        """Left, top, right and bottom of each region [C, 4], in pixels, cut off at the image's edges."""
        place = np.array([(one.x, one.y, one.dx, one.dy) for one in self.grids])[self.grid]
        corner = place[:, :2] + self.cell[:, ::-1] * place[:, 2:]
        return np.concatenate([corner, corner + place[:, 2:]], 1).clip(0, [self.width, self.height] * 2)

    @property
    def texts(self) -> tuple[str, str]:
        """The text before and behind it; token ids where there is no vocabulary."""
        if self.vocabulary is None:
            before, after = ("".join(f"<token {token}> " for token in one) for one in (self.before, self.after))
            return before, after
        return self.vocabulary.text(self.before), self.vocabulary.text(self.after)


class PictureTable:
    """The pictures of a folder. Raises GranaryError wherever one says what no writer of this format writes."""

    def __init__(self, io: ObjectIO, array: Callable[[str], ArrayReader], seq_len: int) -> None:
        self._io, self._array, self._seq_len = io, array, seq_len

    def of(self, index: int, start: int, stop: int | None, vocabulary: Vocabulary | None) -> list[SeenPicture]:
        """Those numbered [start, stop) of a latent's, the strongest first."""
        first, last = (int(end) for end in self._array("seen/offsets").rows(index, index + 2))
        low, high = (int(end) for end in self._array("seen/region_offsets").rows(index, index + 2))
        picture, value, regions = (
            self._array(f"seen/{name}").rows(first, last) for name in ("picture", "value", "regions")
        )
        ends = np.append(0, np.cumsum(regions, dtype=np.int64))
        if len(picture) != last - first or ends[-1] != high - low or (regions == 0).any():
            raise self._damaged(f"the pictures of latent {index}")
        chosen = range(len(picture))[start:stop]
        found = []
        for number in chosen:
            span = low + int(ends[number]), low + int(ends[number + 1])
            grid, cell, share = (self._array(f"regions/{name}").rows(*span) for name in ("grid", "cell", "share"))
            values = share.astype(np.float32) * value[number]
            try:
                one = self._picture(int(picture[number]), float(value[number]), grid, cell, values, vocabulary)
            except ValueError as error:
                raise self._damaged(f"a picture of latent {index}: {error}") from None
            found.append(one)
        return found

    def thumbnail(self, digest: str) -> bytes:
        """WebP of at most 256 pixels a side, compared with its hash and its header before anyone decodes it."""
        try:
            data = self._io.get(f"{THUMBNAILS}/{digest}") if _SHA256.fullmatch(digest) else b""
        except ObjectMissingError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest or not is_thumbnail(data):
            raise self._damaged(f"the picture {digest[:64]}")
        return data

    def _picture(
        self,
        row: int,
        value: float,
        grid: npt.NDArray[np.uint32],
        cell: npt.NDArray[np.int16],
        values: npt.NDArray[np.float32],
        vocabulary: Vocabulary | None,
    ) -> SeenPicture:
        low, high = (int(end) for end in self._array("pictures/grids").rows(row, row + 2))
        width, height = (int(side) for side in self._array("pictures/size").row(row))
        if not 0 < high - low <= MOST_CELLS or not 1 <= width * height <= MOST_PIXELS:
            raise ValueError("it has no grids, or no size")
        parts = [self._array(f"grids/{name}").rows(low, high).tolist() for name in ("row", "shape", "place")]
        grids = [Grid(number, *shape, *place) for number, shape, place in zip(*parts, strict=True)]
        own = grid.astype(np.int64) - low
        shape = np.array([(one.rows, one.cols) for one in grids]).reshape(-1, 2)
        if (own < 0).any() or (own >= len(grids)).any() or (cell < 0).any() or (cell >= shape[own]).any():
            raise ValueError("a region lies outside of its grids")
        context, position = divmod(int(self._array("pictures/place").row(row)), self._seq_len)
        sha256, thumbnail = (bytes(self._array(f"pictures/{name}").row(row)).hex() for name in ("sha256", "thumbnail"))
        before, after = (self._array(f"pictures/{name}").row(row) for name in ("before", "after"))
        return SeenPicture(
            value=value,
            context=context,
            position=position,
            sha256=sha256,
            thumbnail=thumbnail,
            width=width,
            height=height,
            grids=grids,
            grid=own,
            cell=cell,
            values=values,
            before=before[before != NONE],
            after=after[after != NONE],
            vocabulary=vocabulary,
        )

    def _damaged(self, what: str) -> GranaryError:
        return GranaryError(
            f"{what} in {self._io.url} can't be read: the latents folder is damaged; run granary inspect again"
        )
