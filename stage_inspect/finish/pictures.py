"""The pictures that latents fire on: one image of one document each, its grids, the text around it, a thumbnail.

The folder keeps thumbnails, not the images: a page shows no more than that, a folder that goes elsewhere has no store
beside it, and what was decoded and encoded again here is an image whatever the corpus held. P flat positions of some
contexts, W tokens of a window.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.images import EncodedImage, thumbnail
from shared.latents.layout import NONE
from shared.latents.writer import LatentsWriter
from shared.store import Store
from shared.store.format.image_table import MARKS_KIND, SPECIAL, TEXT, ImageRow
from stage_inspect.finish.windows import CONTEXTS
from stage_inspect.scan.pairs import Ints
from stage_inspect.scan.pictures import Shown
from stage_inspect.scan.places import Places


@dataclass(frozen=True)
class Kept:
    """What was written of the pictures."""

    peaks: Ints
    """Places of regions that records name, ascending."""
    picture: Ints
    """Row of the picture that each of them is in."""
    grids: Ints
    """`key` of each grid, ascending."""

    def picture_of(self, places: npt.NDArray[Any]) -> Ints:
        """Rows of the pictures with these peaks."""
        return self.picture[np.searchsorted(self.peaks, places.astype(np.int64))]

    def grid_of(self, pictures: Ints, rows: npt.NDArray[Any]) -> Ints:
        """Which of the grids that were written these rows of the store's table are, in these pictures."""
        return np.searchsorted(self.grids, key(pictures, rows))


def key(pictures: Any, rows: npt.NDArray[Any]) -> Ints:
    """A number for each pair of a picture and a row of the store's table of images."""
    return np.asarray(pictures, np.int64) << 32 | rows.astype(np.int64)


def write_pictures(writer: LatentsWriter, store: Store, peaks: Ints, window: int) -> Kept:
    """Write ``pictures/*``, ``grids/*`` and the thumbnails of all pictures with a region in `peaks`, ascending places.

    Raises GranaryError for an image of the store that is damaged.
    """
    made: dict[str, bytes] = {}
    of_peaks, grid_keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    pictures = written = 0
    writer.append("pictures/grids", np.zeros(1, np.uint64))
    contexts = np.unique(peaks // store.seq_len)
    for start in range(0, len(contexts), CONTEXTS):
        some = contexts[start : start + CONTEXTS]
        segments_BT = store.segments(some)
        places = Places.of(some, store.tokens(some), segments_BT >= 0, segments_BT, window=window, isolated=True)
        shown = Shown.of(store, some, places)
        assert shown is not None
        table = {row.id: row for context in some.tolist() for row in store.pictures.rows_of(context)}
        here = np.flatnonzero(np.isin(places.place_P, peaks))
        numbers, of_peak = np.unique(shown.picture_P[here], return_inverse=True)
        of_peaks.append(pictures + of_peak)
        for picture, number in enumerate(numbers.tolist(), pictures):
            at = np.flatnonzero(shown.picture_P == number)
            grids = [table[row] for row in np.unique(shown.image_P[at]).tolist()]
            sha256 = grids[0].sha256
            if sha256 not in made:
                image = EncodedImage(store.pictures.data(sha256), f"{store.url}: {grids[0].row}")
                made[sha256] = writer.thumbnail(thumbnail(image))
            grid_keys.append(key(picture, np.array([grid.id for grid in grids])))
            written += len(grids)
            writer.append("pictures/grids", np.array([written]))
            writer.append_all(picture_row(places, shown, at, grids, window, made[sha256]))
        pictures += len(numbers)
    return Kept(peaks, np.concatenate(of_peaks), np.concatenate(grid_keys))


def picture_row(
    places: Places, shown: Shown, at: Ints, grids: list[ImageRow], window: int, digest: bytes
) -> dict[str, npt.NDArray[Any]]:
    """One picture with its grids; `at` are its regions, ascending."""
    span = np.arange(places.document_P[at[0]], places.document_end_P[at[0]])
    text = span[np.isin(shown.kind_P[span] & MARKS_KIND, [TEXT, SPECIAL])]
    before = places.tokens_P[text[text < at[0]]][-window:]
    after = places.tokens_P[text[text > at[-1]]][:window]
    first = grids[0]
    return {
        "pictures/place": places.place_P[at[:1]],
        "pictures/sha256": np.frombuffer(bytes.fromhex(first.sha256), np.uint8)[None],
        "pictures/thumbnail": np.frombuffer(digest, np.uint8)[None],
        "pictures/size": np.array([[first.width, first.height]]),
        "pictures/before": padded(before, window),
        "pictures/after": padded(after, window),
        "grids/row": np.array([grid.id for grid in grids]),
        "grids/shape": np.array([[grid.rows, grid.cols] for grid in grids]),
        "grids/place": np.array([[grid.x, grid.y, grid.dx, grid.dy] for grid in grids]),
    }


def padded(tokens: Ints, window: int) -> Ints:
    """One row [1, W] of at most so many tokens."""
    return np.append(tokens, np.full(window - len(tokens), NONE))[None]
