"""Layouts of the two families that cut an image into tiles: LLaVA-NeXT and LLaVA-OneVision.

First come the tokens of the whole image in one tile, then those of the mosaic of tiles, without the cells that are
padding alone, each row ended by a token without a region.
"""

import math

from shared.lm.vision.layout import NO_CELL, Axis, Grid, Layout, raster

SHRINKS_ABOVE = 1.1  # times the side of the largest mosaic, as the model has it


def tiled(
    width: int, height: int, *, best: tuple[int, int], tile: int, patch: int, most_tiles: int | None = None
) -> Layout:
    """The layout of an image whose tiles of `tile` pixels, in patches of `patch`, make `best` (height, width).

    `most_tiles`: a mosaic of many more cells than so many tiles have is shrunk to about that (OneVision).
    """
    side = tile // patch
    base = Grid.over(Axis.stretched(width, tile), Axis.stretched(height, tile), side, side, patch)
    best_height, best_width = best
    new_width, new_height = _fitted(width, height, best_width, best_height)
    x = Axis.stretched(width, new_width).moved((best_width - new_width) // 2)
    y = Axis.stretched(height, new_height).moved((best_height - new_height) // 2)
    cols, rows = best_width // tile * side, best_height // tile * side
    skip_rows, skip_cols = _padding(width, height, rows, cols)
    rows, cols = rows - 2 * skip_rows, cols - 2 * skip_cols
    mosaic = Grid.over(x, y, rows, cols, patch, left=skip_cols * patch, top=skip_rows * patch)
    if most_tiles is not None:
        ratio = math.sqrt(rows * cols / (most_tiles * side**2))
        if ratio > SHRINKS_ABOVE:
            mosaic = _shrunk(mosaic, int(rows // ratio), int(cols // ratio))
    return Layout.of((base, raster(base)), (mosaic, raster(mosaic, newline=True)))


def one_tile(width: int, height: int, *, tile: int, patch: int) -> Layout:
    """OneVision's layout of an image that is not alone in its row: padded to a square, one tile, one newline."""
    longest, side = max(width, height), tile // patch
    scale = tile / longest
    x, y = (Axis(scale, (longest - size) // 2 * scale) for size in (width, height))
    grid = Grid.over(x, y, side, side, patch)
    return Layout.of((grid, [*raster(grid), (NO_CELL, NO_CELL)]))


def _fitted(width: int, height: int, most_width: int, most_height: int) -> tuple[int, int]:
    """The largest size of the image's shape inside another, as the image processors round it."""
    scale_x, scale_y = most_width / width, most_height / height
    if scale_x < scale_y:
        return most_width, min(math.ceil(height * scale_x), most_height)
    return min(math.ceil(width * scale_y), most_width), most_height


def _padding(width: int, height: int, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of cells at either side of the mosaic that the model leaves out, as it rounds them."""
    if width / height > cols / rows:
        return (rows - int(round(height * (cols / width), 7))) // 2, 0
    return 0, (cols - int(round(width * (rows / height), 7))) // 2


def _shrunk(grid: Grid, rows: int, cols: int) -> Grid:
    return Grid(rows, cols, grid.x, grid.y, grid.dx * grid.cols / cols, grid.dy * grid.rows / rows)
