"""Looking at the images of a multimodal store with the dictionary that a latents folder is of.

C regions of an image, N regions of a batch.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from shared.basics.config import Split
from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.store.choose import choose_contexts
from shared.store.format.image_table import ImageRow
from stage_inspect.concepts.search import Inspected
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.pairs import Ints

BoxOf = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels of the upright image."""
COVERED = 0.5  # of a region, from which on it counts as inside


@dataclass(frozen=True, slots=True)
class Region:
    """A region of an image in the store, and a latent's activation there."""

    value: float
    context: int
    position: int
    number: int
    """Which image of its context, from 0."""
    grid: int
    """Which of the image's grids, from 0."""
    row: int
    col: int
    box: BoxOf
    sha256: str
    """Of the image, under which the store keeps it."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """The regions on which a latent fires most."""

    latent: int
    seen: int
    """Regions that were looked at."""
    fired: int
    """Regions on which it fires."""
    regions: list[Region]


@dataclass(frozen=True, slots=True)
class InBox:
    """A latent that fires in a box of an image. Means are over regions, each by the part of it that the box covers."""

    latent: int
    strength: float
    """The largest activation of a region that the box covers by half; of all that it touches where there is none."""
    inside: float
    """Mean activation inside."""
    outside: float
    """Mean activation in the rest of the image."""
    share: float
    """Part of the latent's activation in this image that lies inside."""


@dataclass(frozen=True, slots=True)
class Boxed:
    """What fires in a box; the latents whose mean inside is most above that outside come first."""

    context: int
    number: int
    box: BoxOf
    regions: float
    """Regions inside, parts of them as parts."""
    regions_outside: float
    latents: list[InBox]


class Looking:
    """Safe to use from several threads; one question is answered at a time."""

    def __init__(self, inspected: Inspected) -> None:
        self._inspected, self._pictures = inspected, inspected.store.pictures
        self._lock = threading.Lock()

    @classmethod
    def open(cls, url: str, sae: str | None = None, store: str | None = None) -> Self:
        """Begin from the latents folder at `url`; `sae` and `store` are None where they lie as it says.

        Raises GranaryError where one of them is not there, or is another's.
        """
        return cls.of(Latents.open(url), sae, store)

    @classmethod
    def of(cls, latents: Latents, sae: str | None = None, store: str | None = None) -> Self:
        """Begin as `open` does, from a folder that is open."""
        return cls(Inspected.open(latents, sae, store))

    @property
    def num_contexts(self) -> int:
        """Contexts of the store."""
        return self._inspected.store.num_contexts

    def images(self, context: int) -> list[list[ImageRow]]:
        """The images of a context, the grids of each. Raises GranaryError for a context that is not there."""
        if not 0 <= context < self.num_contexts:
            raise GranaryError(f"there is no context {context}: the store has 0 to {self.num_contexts - 1}")
        found: dict[int, list[ImageRow]] = {}
        for row in self._pictures.rows_of(context):
            found.setdefault(row.number, []).append(row)
        return [found[number] for number in sorted(found)]

    def data(self, sha256: str) -> bytes:
        """An image of the store, as it was encoded."""
        return self._pictures.data(sha256)

    def box(self, context: int, number: int, box: Sequence[float]) -> Boxed:
        """The latents that fire in a box of image `number` of a context. Raises GranaryError for a box beside it."""
        images = self.images(context)
        if not 0 <= number < len(images):
            raise GranaryError(f"context {context} has {len(images)} images: there is no number {number}")
        rows = {row.id: row for row in images[number]}
        given = box_of(box)
        image_T, cell_T = self._pictures.image([context])[0], self._pictures.cell([context])[0]
        with self._lock:
            (batch,) = self._reader.batches(np.array([context]))
        at_N = batch.at_N[np.isin(image_T[batch.at_N], list(rows)) & (cell_T[batch.at_N, 0] >= 0)]
        boxes = np.array([rows[int(image_T[at])].box(*cell_T[at].tolist()) for at in at_N]).reshape(-1, 4)
        inside_N = covered(boxes, given)
        if not inside_N.any():
            first = images[number][0]
            raise GranaryError(
                f"the box {list(given)} meets no region of the image, {first.width} x {first.height} pixels"
            )
        chosen = np.isin(batch.at_N, at_N)
        latents = in_box(batch.indices_NK[chosen], batch.values_NK[chosen], inside_N)
        return Boxed(context, number, given, float(inside_N.sum()), float((1 - inside_N).sum()), latents)

    def regions(
        self,
        latent: int,
        *,
        count: int = 100,
        split: Split | str = Split.all,
        contexts: int | None = None,
        tell: Callable[[int], None] = lambda tokens: None,
    ) -> Ranked:
        """The regions of all images on which a latent fires most, the strongest first; of equal ones the earliest.

        `tell` gets the number of tokens of each batch. Raises GranaryError for a latent that is not there.
        """
        if not 0 <= latent < self._inspected.latents.num_latents or count < 1:
            raise GranaryError(f"there is no latent {latent}, or nothing to list: {count} regions")
        value_N, place_N = np.empty(0, np.float32), np.empty(0, np.int64)
        seen = fired = 0
        for batch in self._reader.batches(self.chosen(split, contexts)):
            assert batch.shown is not None
            is_region = batch.shown.picture_P[batch.at_N] >= 0
            row, slot = np.nonzero((batch.indices_NK == latent) & is_region[:, None])
            seen, fired = seen + int(is_region.sum()), fired + len(row)
            value_N = np.append(value_N, batch.values_NK[row, slot])
            place_N = np.append(place_N, batch.places.place_P[batch.at_N[row]])
            best = np.lexsort((place_N, -value_N))[:count]
            value_N, place_N = value_N[best], place_N[best]
            tell(len(batch.places.place_P))
        regions = [self._region(place, value) for place, value in zip(place_N.tolist(), value_N.tolist(), strict=True)]
        return Ranked(latent, seen, fired, regions)

    def chosen(self, split: Split | str, contexts: int | None) -> Ints:
        """The contexts of a split, or so many of them, evenly spaced."""
        return choose_contexts(self._inspected.store, Split(split), contexts)

    def _region(self, place: int, value: float) -> Region:
        context, position = divmod(place, self._inspected.store.seq_len)
        image = int(self._pictures.image([context])[0, position])
        row, col = self._pictures.cell([context])[0, position].tolist()
        (own,) = [one for one in self._pictures.rows_of(context) if one.id == image]
        return Region(value, context, position, own.number, own.grid, row, col, own.box(row, col), own.sha256)

    @cached_property
    def _reader(self) -> BatchReader:
        made_of = self._inspected
        dictionary = made_of.folder.load(torch.device("cpu"))
        return BatchReader(
            made_of.store, dictionary, made_of.folder.sites, made_of.latents.meta.window, made_of.store.isolated
        )


def box_of(sides: Sequence[float]) -> BoxOf:
    """Four numbers as a box; raises GranaryError for what is none, or empty."""
    found = [float(side) for side in sides]
    if len(found) != 4 or not np.isfinite(found).all() or not (found[0] < found[2] and found[1] < found[3]):
        raise GranaryError(f"the box {found} is empty or none: give left, top, right and bottom in pixels")
    return found[0], found[1], found[2], found[3]


def covered(boxes: npt.NDArray[np.float64], box: BoxOf) -> npt.NDArray[np.float64]:
    """The part of each of `boxes` [C, 4] that lies in `box`, 0 to 1 [C]; 0 for one without an area."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    both, area = (high - low).clip(0).prod(1), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    part: npt.NDArray[np.float64] = np.divide(both, area, out=np.zeros(len(boxes)), where=area > 0)
    return part


def in_box(indices_CK: Ints, values_CK: npt.NDArray[np.float32], inside_C: npt.NDArray[np.float64]) -> list[InBox]:
    """The latents that fire on a region that is covered by half, or on one that is touched where there is none."""
    region, slot = np.nonzero(indices_CK >= 0)
    latents, number = np.unique(indices_CK[region, slot], return_inverse=True)
    value, weight = values_CK[region, slot].astype(np.float64), inside_C[region]

    def sums(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(number, weights=terms, minlength=len(latents)).astype(np.float64)

    inside = sums(weight * value) / inside_C.sum()
    outside = sums((1 - weight) * value) / max((1 - inside_C).sum(), 1e-12)
    share = sums(weight * np.abs(value)) / np.maximum(sums(np.abs(value)), 1e-300)
    least = COVERED if (inside_C >= COVERED).any() else 0.0
    counts = (weight >= least) & (weight > 0)
    strength = np.full(len(latents), -np.inf)
    np.maximum.at(strength, number[counts], value[counts])
    order = np.lexsort((latents, outside - inside))
    return [
        InBox(int(latents[one]), *(float(column[one]) for column in (strength, inside, outside, share)))
        for one in order
        if np.isfinite(strength[one])
    ]


def as_json(found: Ranked | Boxed) -> dict[str, Any]:
    """The result as JSON holds it."""
    return asdict(found)
