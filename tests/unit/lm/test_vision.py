"""Which token of an image stands for which region of it, proved by pixels; and the cut model against the whole one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm import capture, load_trunk
from shared.lm.hookpoint import HookPoint
from shared.lm.vision.layout import NO_CELL
from shared.lm.vision.reader import VisionReader
from tests.picture_models import picture_model, quick_first

Image = pytest.importorskip("PIL.Image")

# One of a tile's shape, one of another, one upright, one long, one square.
SHAPES = [(56, 28), (75, 45), (41, 83), (150, 40), (64, 64)]
QUICK = 1
TILED = ("llava_next", "llava_onevision")
LEAST = {"llava_onevision": 0.9}  # whose shrunk mosaic mixes neighbours


class Case:
    """A model and what it computes for an image in a short row."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.whole = picture_model(family, folder)
        self.reader = VisionReader.load(str(folder))
        self.trunks: dict[int, Any] = {}

    def trunk(self, layers: int) -> Any:
        if layers not in self.trunks:
            self.trunks[layers] = load_trunk(str(self.folder), num_layers=layers)
        return self.trunks[layers]

    def inputs(self, images: list[Any]) -> dict[str, Any]:
        layouts = [self.reader.layout(*image.size, len(images), "here") for image in images]
        ids = [1, 9, *[token for one in layouts for token in ([self.reader.image_id] * len(one) + [11])], 12]
        return self.reader.inputs(torch.tensor(ids), images)

    def embedded(self, image: Any) -> Tensor:
        """What goes into layer 0 at the tokens of the image, [L, d]."""
        inputs, point = self.inputs([image]), HookPoint(0, "resid_pre")
        with torch.no_grad(), capture(self.trunk(1), [point]) as captured:
            self.trunk(1)(**inputs)
        return captured[point][0][inputs["input_ids"][0] == self.reader.image_id]


@pytest.fixture(scope="module", params=quick_first())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def noise(width: int, height: int) -> np.ndarray:
    """Blocks of a few pixels, which survive being resized."""
    small = np.random.default_rng(0).integers(64, 192, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return small.repeat(4, 0).repeat(4, 1)[:height, :width]


def inverted(pixels: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    left, top, right, bottom = (round(x) for x in box)
    changed = pixels.copy()
    changed[max(top, 0) : bottom, max(left, 0) : right] ^= 255
    return changed


def moved(case: Case, width: int, height: int, step: int) -> tuple[int, int]:
    """Of the cells tried, how many are those whose token, of its grid, moves most when their pixels are inverted."""
    layout, pixels = case.reader.layout(width, height, 1, "here"), noise(width, height)
    before = case.embedded(Image.fromarray(pixels))
    assert len(before) == len(layout)
    right = tried = 0
    for token in np.flatnonzero(layout.cell_L2[:, 0] != NO_CELL)[::step].tolist():
        grid = int(layout.grid_L[token])
        box = layout.grids[grid].box(*layout.cell_L2[token].tolist())
        change_L = (case.embedded(Image.fromarray(inverted(pixels, box))) - before).norm(dim=1)
        change_L[torch.from_numpy(layout.grid_L != grid)] = -1
        right, tried = right + (int(change_L.argmax()) == token), tried + 1
    return right, tried


def test_inverting_the_pixels_of_a_cell_moves_its_token(case: Case) -> None:
    right, tried = moved(case, *SHAPES[QUICK], step=3)
    assert right >= LEAST.get(case.family, 0.95) * tried


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_inverting_any_cell_of_any_shape_moves_its_token(case: Case, shape: tuple[int, int]) -> None:
    right, tried = moved(case, *shape, step=1)
    assert right >= LEAST.get(case.family, 0.95) * tried


@pytest.mark.parametrize("shape", SHAPES)
def test_cells_cover_what_the_model_sees_of_the_image(case: Case, shape: tuple[int, int]) -> None:
    width, height = shape
    layout = case.reader.layout(width, height, 1, "here")
    for number, grid in enumerate(layout.grids):
        cells = layout.cell_L2[(layout.grid_L == number) & (layout.cell_L2[:, 0] != NO_CELL)].tolist()
        assert cells == [[row, col] for row in range(grid.rows) for col in range(grid.cols)]
        left, top, _, _ = grid.box(0, 0)
        _, _, right, bottom = grid.box(grid.rows - 1, grid.cols - 1)
        if case.family == "llava":  # the middle square of the image, within a pixel
            side, start = min(shape), (max(shape) - min(shape)) / 2
            seen = (start, 0, start + side, side) if width > height else (0, start, side, start + side)
            assert np.allclose((left, top, right, bottom), seen, atol=2.1)
        elif case.family in TILED and number == 1:  # no cell of the mosaic is padding alone but at its very edge
            assert max(left, width - right) < grid.dx
            assert max(top, height - bottom) < grid.dy
            assert min(left, 0) >= -grid.dx
            assert min(top, 0) >= -grid.dy
        else:
            assert np.allclose((left, top, right, bottom), (0, 0, width, height), atol=1)
    ends = (layout.cell_L2 == NO_CELL).all(1)
    assert ends.sum() == (layout.grids[1].rows if case.family in TILED else 0)


def test_the_cut_model_gives_the_activations_of_the_whole_one(case: Case) -> None:
    sites = ("resid_pre", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out")
    points = [HookPoint(2, site) for site in sites] + [HookPoint(0, "resid_pre"), HookPoint(1, "mlp_out")]
    images = [Image.fromarray(noise(*shape)) for shape in SHAPES[:2]]
    assert len(case.trunk(3).get_decoder().layers) == 3
    for shown in ([], images[:1], images):
        inputs = case.inputs(shown)
        found = []
        for model in (case.whole, case.trunk(3)):
            with torch.no_grad(), capture(model, points) as captured:
                model(**inputs)
            found.append(dict(captured))
        for point in points:
            assert torch.equal(found[0][point], found[1][point]), point


def test_deepstack_is_in_what_goes_into_the_next_layer(case: Case) -> None:
    inputs, after, before = case.inputs([Image.fromarray(noise(64, 64))]), HookPoint(1, "resid_pre"), None
    with torch.no_grad(), capture(case.trunk(3), [after]) as captured:
        handle = case.trunk(3).get_decoder().layers[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
        seen: list[Tensor] = []
        case.trunk(3)(**inputs)
        handle.remove()
    before = seen[0]
    is_image = inputs["input_ids"] == case.reader.image_id
    differs = (before != captured[after]).any(-1)
    assert torch.equal(differs, is_image if case.family == "qwen3_vl" else torch.zeros_like(is_image))
    if case.family == "qwen3_vl":
        with (
            pytest.raises(GranaryError, match=r"choose\s+layers\.1\.resid_pre"),
            capture(case.trunk(3), [HookPoint(0, "resid_post")]),
        ):
            pass


def test_a_shape_or_a_setting_that_does_not_fit_is_one_line(case: Case) -> None:
    reader = case.reader
    if case.family.startswith("qwen"):
        with pytest.raises(GranaryError, match="rows row 3: absolute aspect ratio must be smaller than 200"):
            reader.layout(10_000, 10, 1, "rows row 3")
    if case.family == "llava":
        assert reader.layout(10_000, 10, 1, "rows row 3").grids[0].dx > 0
        with pytest.raises(GranaryError, match=r"rows row 3: .* too long a shape"):
            reader.layout(1_000_000, 1, 1, "rows row 3")
    if case.family == "gemma3":
        reader.processor.do_pan_and_scan = True
        with pytest.raises(GranaryError, match="do_pan_and_scan"):
            reader.layout(30, 30, 1, "rows row 3")
        reader.processor.do_pan_and_scan = None


def test_what_reads_no_images_is_refused() -> None:
    with pytest.raises(GranaryError, match=r"bundled is a llama: rows with images are known for llava, .*gemma3"):
        VisionReader.load("bundled")
