"""The images that a batch of prompts shows: which token is which region of which of them.

    reader = VisionReader.load("llava")
    shown = reader.shown([[image]])                 # the images of each row, or their (width, height)

Shapes: B rows, T positions of a forward, L tokens of the images of a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.vision.layout import NO_CELL, Layout

Box = tuple[float, float, float, float]
NEAR = 0.5
"""Pixels by which a cell may reach over a box that it lies in: processors round by less than one."""


class Regions(NamedTuple):
    """What the tokens of a forward are of the images of their rows."""

    image_BT: Tensor
    """int64: number of the image in its row; -1 for a token that is no region."""
    box_BT4: Tensor
    """float64: left, top, right and bottom in pixels of the upright image; NaN for a token that is no region."""

    def inside(self, image: int, box: Box | None) -> Tensor:
        """bool [B, T]: regions of the image with that number, those that lie wholly in `box` where one is given."""
        found_BT = self.image_BT == image
        if box is None:
            return found_BT
        least, most = (torch.tensor(box[part], dtype=torch.float64) for part in (slice(2), slice(2, 4)))
        boxes_BT4 = self.box_BT4.cpu()
        is_in_BT = (boxes_BT4[..., :2] >= least - NEAR).all(-1) & (boxes_BT4[..., 2:] <= most + NEAR).all(-1)
        return found_BT & is_in_BT.to(found_BT.device)


@dataclass(frozen=True, eq=False)
class Shown:
    """The images of the rows of a batch, in the order of their placeholders; made by ``VisionReader.shown``."""

    family: str
    """The ``model_type`` of the model."""
    image_id: int
    """The token at whose places the model puts the features of images."""
    sizes: tuple[tuple[tuple[int, int], ...], ...]
    """Width and height of each row's images, upright, in pixels."""
    layouts: tuple[tuple[Layout, ...], ...]

    def regions(self, ids_BT: Tensor, before_B: Tensor, in_prompt_BT: Tensor, *, is_end: bool) -> Regions:
        """What the tokens `ids_BT` of a forward are; `before_B` image tokens of each row were in forwards before.

        Rows may be repeated, as those of several sequences for each prompt are. `in_prompt_BT`: false for padding and
        what was generated; `is_end`: whether the prompts end in this forward. Raises GranaryError where the tokens are
        not those of these images.
        """
        rows, given = len(ids_BT), len(self.layouts)
        if rows % given:
            raise GranaryError(f"the batch has {rows} rows, and images are given for {given}: give a list for each row")
        is_image_BT = (ids_BT == self.image_id) & in_prompt_BT
        number_RL, box_RL4, length_R = (one.to(ids_BT.device) for one in self._table())
        times = rows // given
        length_B = length_R.repeat_interleave(times)
        count_BT = is_image_BT.cumsum(1) + before_B[:, None]
        is_wrong_B = (count_BT[:, -1] != length_B) if is_end else (count_BT[:, -1] > length_B) & is_image_BT.any(1)
        if is_wrong_B.any():
            wrong = int(is_wrong_B.long().argmax())
            self._refuse(wrong // times, int(count_BT[wrong, -1]))
        place_BT = (count_BT - 1).clamp_min(0)
        row_B1 = torch.arange(given, device=ids_BT.device).repeat_interleave(times)[:, None]
        return Regions(
            torch.where(is_image_BT, number_RL[row_B1, place_BT], -1),
            torch.where(is_image_BT[..., None], box_RL4[row_B1, place_BT], torch.nan),
        )

    def check(self, image: int, box: Box | None) -> None:
        """Raise GranaryError where no row has an image of that number, and where no cell of any lies in `box`."""
        rows = zip(self.sizes, self.layouts, strict=True)
        found = [(sizes[image], layouts[image]) for sizes, layouts in rows if image < len(sizes)]
        if not found:
            most = max(map(len, self.layouts))
            raise GranaryError(f"there is no image {image}: rows have at most {most}, numbered from 0")
        if box is None:
            return
        number_RL, box_RL4, _ = self._table()
        if not Regions(number_RL, box_RL4).inside(image, box).any():
            (width, height), layout = found[0]
            cells = " and ".join(dict.fromkeys(f"{grid.dx:.4g} x {grid.dy:.4g}" for grid in layout.grids))
            raise GranaryError(
                f"no region of image {image} ({width} x {height} pixels) lies wholly in the box {box}: its cells are of"
                f" {cells} pixels, draw a larger box"
            )

    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the images' tokens of each row, in order: image [R, L], box [R, L, 4]; and their number [R]."""
        length_R = torch.tensor([sum(map(len, row)) for row in self.layouts])
        number_RL = torch.full((len(self.layouts), max(1, int(length_R.max()))), -1)
        box_RL4 = torch.full((*number_RL.shape, 4), torch.nan, dtype=torch.float64)
        for row, layouts in enumerate(self.layouts):
            start = 0
            for number, layout in enumerate(layouts):
                place_N = np.flatnonzero(layout.cell_L2[:, 0] != NO_CELL)
                cells = zip(layout.grid_L[place_N].tolist(), layout.cell_L2[place_N].tolist(), strict=True)
                number_RL[row, start + place_N] = number
                boxes = [layout.grids[grid].box(*cell) for grid, cell in cells]
                box_RL4[row, start + place_N] = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
                start += len(layout)
        return number_RL, box_RL4, length_R

    def _refuse(self, row: int, count: int) -> None:
        sizes = ", ".join(f"{width} x {height}" for width, height in self.sizes[row]) or "none"
        needed = sum(map(len, self.layouts[row]))
        raise GranaryError(
            f"row {row} of the batch has {count} image tokens, and its images ({sizes} pixels) make {needed}: give the"
            " images that the model is called with, upright, a list for each row"
        )


def size_of(image: object) -> tuple[int, int]:
    """Width and height of a PIL image, or as they are given; raises GranaryError for what is neither."""
    found = getattr(image, "size", image)
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(one, int) and one > 0 for one in found):
        raise GranaryError(
            f"{type(image).__name__} is no image: give a list for each row, of PIL images or (width, height) in pixels"
        )
    return found
