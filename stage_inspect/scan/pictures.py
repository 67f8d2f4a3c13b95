"""Which positions of some contexts are regions of which pictures, and what else each position holds.

A picture is one image of one document: shown twice there, or in several grids, it is still one. P flat positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.format.image_table import IMAGE, MARKS_KIND
from shared.store.pictures import of_kinds
from stage_inspect.scan.log import RECORDS, Columns
from stage_inspect.scan.pairs import Ints, Pairs, lengths, peaks, starts_of
from stage_inspect.scan.places import Places


@dataclass(frozen=True)
class Shown:
    """What the positions of some contexts of a multimodal store hold."""

    kind_P: npt.NDArray[np.uint8]
    image_P: Ints
    """Row of the store's table of images; -1 for none."""
    cell_P2: npt.NDArray[np.int16]
    picture_P: Ints
    """Number of the picture among those of these contexts, in the order of document and hash; -1 for no region."""

    @classmethod
    def of(cls, store: Store, contexts: Ints, places: Places) -> "Shown | None":
        """What contexts whose positions are `places` show; None for a store of text alone.

        Raises GranaryError for a region of an image that the store's table lacks.
        """
        if not store.plan.has_images:
            return None
        stored = store.pictures
        kind_P, image_P = stored.kind(contexts).reshape(-1), stored.image(contexts).reshape(-1).astype(np.int64)
        at = np.flatnonzero((kind_P & MARKS_KIND) == IMAGE)
        rows = {row.id: row.sha256 for context in contexts.tolist() for row in stored.rows_of(context)}
        named = [rows.get(image, "") for image in image_P[at].tolist()]
        if not all(named):
            raise GranaryError(f"{store.url} has regions of images that its table lacks: run granary store verify")
        _, number = np.unique(named or [""], return_inverse=True)
        picture_P = np.full(len(kind_P), -1)
        if len(at):
            pairs = places.document_P[at] * len(at) + number
            picture_P[at] = np.unique(pairs, return_inverse=True)[1]
        return cls(kind_P, image_P, stored.cell(contexts).reshape(-1, 2), picture_P)

    def of_kind(self, kind: str, at: Ints) -> npt.NDArray[np.bool_]:
        """Whether these positions are of a kind of `shared.latents.layout.KINDS`."""
        return of_kinds(self.kind_P[at], [kind])


@dataclass(frozen=True)
class Firing:
    """Runs of regions of one picture on which one latent fires."""

    pairs: Pairs
    """Ascending by latent, picture and place."""
    starts: Ints
    peak: Ints
    """Of the first of the largest of each run."""


def firing(pairs: Pairs, shown: Shown) -> Firing:
    """The pairs on regions, by latent and picture."""
    picture = shown.picture_P[pairs.at]
    on = np.flatnonzero(picture >= 0)
    on = on[np.lexsort((pairs.at[on], picture[on], pairs.latent[on]))]
    found = Pairs(pairs.latent[on], pairs.at[on], pairs.value[on])
    starts = starts_of(found.latent, picture[on])
    return Firing(found, starts, peaks(found.value, starts))


def picture_records(found: Firing, chosen: npt.NDArray[np.bool_], places: Places, shown: Shown) -> Columns:
    """Records of the chosen runs, with the activation of every region."""
    pairs, peak = found.pairs, found.peak[chosen]
    count = lengths(found.starts, len(pairs.at))
    at = pairs.at[np.repeat(chosen, count)]
    value = np.repeat(pairs.value[peak], count[chosen])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.where(value == 0, 0, pairs.value[np.repeat(chosen, count)] / value)
    columns: dict[str, Any] = {
        "latent": pairs.latent[peak],
        "place": places.place_P[pairs.at[peak]],
        "value": pairs.value[peak],
        "active": count[chosen],
        "image": shown.image_P[at],
        "row": shown.cell_P2[at, 0],
        "col": shown.cell_P2[at, 1],
        "share": share,
    }
    return {name: columns[name].astype(dtype) for name, dtype in RECORDS["pictures"].items()}
