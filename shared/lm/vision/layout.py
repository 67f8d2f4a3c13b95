"""Which token of an image stands for which region of it: grids of cells, and the token order over them.

All coordinates are pixels of the image in RGB, upright, x to the right and y down. A layout is a function of the width
and height of the image alone, so it is known before a pixel is processed; tests compare it with what models compute.

Shapes: L tokens of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NO_CELL = -1


class Axis(NamedTuple):
    """How one axis of the image became one of what the tower sees: pixel = image * scale + shift."""

    scale: float
    shift: float

    @classmethod
    def stretched(cls, size: int, new_size: int) -> "Axis":
        """`size` pixels resized to `new_size`."""
        return cls(new_size / size, 0.0)

    def moved(self, pixels: float) -> "Axis":
        """Padded by so many pixels before the first, or cut where negative."""
        return Axis(self.scale, self.shift + pixels)

    def back(self, pixel: float) -> float:
        """The place in the image of a place in what the tower sees."""
        return (pixel - self.shift) / self.scale


@dataclass(frozen=True, slots=True)
class Grid:
    """Equal cells over an image or a part of it; cell (r, c) begins at (x + c * dx, y + r * dy)."""

    rows: int
    cols: int
    x: float
    y: float
    dx: float
    dy: float

    @classmethod
    def over(cls, x: Axis, y: Axis, rows: int, cols: int, cell: float, left: float = 0, top: float = 0) -> "Grid":
        """`rows` x `cols` cells of `cell` pixels of what the tower sees, the first one at (`left`, `top`) of it."""
        return cls(rows, cols, x.back(left), y.back(top), cell / x.scale, cell / y.scale)

    def box(self, row: int, col: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a cell; it may reach beyond the image where that was padded."""
        left, top = self.x + col * self.dx, self.y + row * self.dy
        return left, top, left + self.dx, top + self.dy


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The tokens of one image, in order."""

    grids: tuple[Grid, ...]
    grid_L: npt.NDArray[np.int32]
    """Which of `grids` the token's cell is in; of one without a region, the grid that it follows."""
    cell_L2: npt.NDArray[np.int16]
    """Row and column there; (-1, -1) for a token without a region."""

    def __len__(self) -> int:
        return len(self.grid_L)

    @classmethod
    def of(cls, *parts: tuple[Grid, Sequence[tuple[int, int]]]) -> "Layout":
        """Grids, each with the cells of its tokens in order."""
        counts = [len(cells) for _, cells in parts]
        cells = [cell for _, found in parts for cell in found]
        grid_L = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        return cls(tuple(grid for grid, _ in parts), grid_L, np.array(cells, np.int16).reshape(-1, 2))


def raster(grid: Grid, *, newline: bool = False) -> list[tuple[int, int]]:
    """The cells of a grid row by row; `newline`: a token without a region ends each row."""
    end = [(NO_CELL, NO_CELL)] if newline else []
    return [cell for row in range(grid.rows) for cell in [*((row, col) for col in range(grid.cols)), *end]]
