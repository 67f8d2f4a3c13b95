"""What a model that reads images is shown of a latent: pictures it fires on, as they are, masked, and overlaid.

The pictures are those that the latents folder keeps, of at most 256 pixels a side, so that neither the store nor the
corpus has to be at hand. An image is on one side, for explanations or for tests, however often it is shown.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.basics.images import pillow
from shared.latents.examples import DECILES
from shared.latents.folder import Latents
from shared.latents.pictures import SeenPicture
from stage_inspect.explain.examples import BothSides
from stage_inspect.explain.sides import Side, Sides

CONVENTION = "the image, the regions above half of its largest activation, a red overlay of all regions"
STRONG = 0.5  # times the picture's largest activation: what the mask leaves
GREY, RED, OPACITY = (127, 127, 127), (255, 0, 0), 0.6
LOOKED_AT = 64  # other latents whose pictures are looked through for silent ones
SHOWN_OF_EACH = 8  # of their strongest

Part = dict[str, Any]


@dataclass(frozen=True)
class TestedPicture:
    """A picture of the test."""

    picture: SeenPicture
    is_active: bool
    quantile: int | None
    """0 (strongest) to 9: its tenth of the latent's pictures that are kept; None for a silent one."""

    @property
    def place(self) -> tuple[int, int]:
        """(context, position of its first region)."""
        return self.picture.context, self.picture.position

    @property
    def record(self) -> dict[str, Any]:
        """What is kept of it where it was judged wrongly."""
        return {"picture": self.picture.thumbnail, "sha256": self.picture.sha256, "place": list(self.place)}


@dataclass(frozen=True)
class ChosenPictures(BothSides[SeenPicture, TestedPicture]):
    """Pictures of one latent on both sides."""

    TO_EXPLAIN = "pictures on the side of explanations"
    TO_TEST = (
        "pictures on the side of tests on which it fires",
        "pictures on the side of tests on which it does not",
    )


def choose_pictures(latents: Latents, index: int, sides: Sides, num_train: int, num_test: int) -> ChosenPictures:
    """Pictures of a latent: at most `num_train` of one side; of the other `num_test` active and as many silent.

    A silent one is a picture on which another latent fires and of which this one has no record: where more pictures
    fire it than the folder keeps, it may fire there more weakly than on all that are kept. Each image is taken once.
    Raises GranaryError for a folder without pictures.
    """
    if not latents.has_pictures:
        raise GranaryError(f"{latents.url} has no pictures: granary inspect a store with images, docs/vision.md")
    own = latents.pictures(index)
    ranked = [(rank * DECILES // len(own), one) for rank, one in enumerate(own)]
    seen: set[str] = set()
    train = [one for _, one in _once(ranked, sides, "train", seen)][:num_train]
    active = [TestedPicture(one, True, tenth) for tenth, one in _once(ranked, sides, "test", seen)]
    fires = {one.sha256 for one in own}
    others = ((0, one) for one in _of_others(latents, index) if one.sha256 not in fires)
    silent: list[TestedPicture] = []
    for _, one in _once(others, sides, "test", set()):
        if len(silent) == num_test:
            break
        silent.append(TestedPicture(one, False, None))
    step = max(1, -(-len(active) // num_test))
    return ChosenPictures(index, train, active[::step][:num_test], silent)


def _once(
    ranked: Iterable[tuple[int, SeenPicture]], sides: Sides, side: Side, seen: set[str]
) -> Iterator[tuple[int, SeenPicture]]:
    for tenth, one in ranked:
        if one.sha256 not in seen and sides.of_image(one.sha256) == side:
            seen.add(one.sha256)
            yield tenth, one


def _of_others(latents: Latents, index: int) -> Iterator[SeenPicture]:
    """The strongest pictures of other latents, in an order by chance that is the same each time."""
    order = np.random.default_rng(index).permutation(len(latents.table["fired"]))
    firing = [other for other in order.tolist() if other != index and latents.table["fired"][other]]
    for other in firing[:LOOKED_AT]:
        yield from latents.pictures(other, SHOWN_OF_EACH)


def explained(latents: Latents, pictures: Sequence[SeenPicture]) -> list[Part]:
    """What an explainer is shown: three pictures of each."""
    parts: list[Part] = []
    for number, one in enumerate(pictures, 1):
        data = latents.thumbnail(one.thumbnail)
        masked, overlaid = drawn(data, one)
        parts.append(text_part(f"Example {number}: the image, the firing regions alone, the overlay"))
        parts += [image_part(data, "webp"), image_part(masked, "png"), image_part(overlaid, "png")]
    return parts


def listed(latents: Latents, pictures: Sequence[SeenPicture]) -> list[Part]:
    """What a judge is shown: numbered pictures as they are."""
    parts: list[Part] = []
    for number, one in enumerate(pictures, 1):
        parts += [text_part(f"Image {number}:"), image_part(latents.thumbnail(one.thumbnail), "webp")]
    return parts


def drawn(data: bytes, picture: SeenPicture) -> tuple[bytes, bytes]:
    """PNGs of a picture: all but its strongly firing regions grey, and overlaid by how much it fires."""
    image_module, _ = pillow()
    with image_module.open(io.BytesIO(data)) as opened:
        pixels = np.asarray(opened.convert("RGB"), np.float32)
    share = heat(picture, pixels.shape[1], pixels.shape[0])[..., None]
    masked = np.where(share >= STRONG, pixels, np.array(GREY, np.float32))
    overlaid = pixels + share * OPACITY * (np.array(RED, np.float32) - pixels)
    return _png(masked), _png(overlaid)


def heat(picture: SeenPicture, width: int, height: int) -> npt.NDArray[np.float32]:
    """How much the latent fires at each pixel of the picture drawn in this size, as a share of its largest, [H, W].

    Where regions of two grids lie over one another the larger counts.
    """
    found = np.zeros((height, width), np.float32)
    scale = np.array([width / picture.width, height / picture.height] * 2)
    boxes = np.rint(picture.boxes * scale).astype(int)
    for (left, top, right, bottom), value in zip(boxes.tolist(), picture.values.tolist(), strict=True):
        part = found[top:bottom, left:right]
        np.maximum(part, value / picture.value, out=part)
    return found


def text_part(text: str) -> Part:
    """A part of a message."""
    return {"type": "text", "text": text}


def image_part(data: bytes, kind: str) -> Part:
    """The same of an image, whose bytes are in the message itself."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def _png(pixels: npt.NDArray[np.float32]) -> bytes:
    image_module, _ = pillow()
    buffer = io.BytesIO()
    image_module.fromarray(np.rint(pixels).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
