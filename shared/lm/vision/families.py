"""One row per family of vision-language models: the layout of an image, what its placeholder is, what a forward needs.

A row is added with its tiny model in tests/picture_models.py, whose pixels prove the layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

from transformers import PretrainedConfig

from shared.basics.errors import GranaryError
from shared.lm.vision.layout import NO_CELL, Axis, Grid, Layout, raster
from shared.lm.vision.tiles import one_tile, tiled

MOST_RESIZED = 64 * 1024 * 1024
"""Pixels of a resized image before it is cropped: one 10,000 times as wide as high would fill the memory."""

LayoutRule = Callable[[PretrainedConfig, Any, int, int, int], Layout]
"""(configuration, image processor, width, height, images in the row) to the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionFamily:
    """What tells one family from another."""

    layout: LayoutRule
    type_ids: str | None = None
    """Name of the forward's argument that marks image tokens; None where it has none."""
    structure: tuple[str, ...] = ()
    """Configuration keys of the tokens that stand around an image."""
    placeholder: str = "image_token_id"
    """Configuration key of the token that stands for an image in the chat template's text."""
    wrapped: bool = False
    """Whether the processor puts line breaks, and the image's marks, around the placeholder (Gemma 3)."""
    nested: bool = False
    """Whether the image processor wants the images of a row in a list of their own."""


def _llava(config: PretrainedConfig, processor: Any, width: int, height: int, count: int) -> Layout:
    vision = config.vision_config
    before = _class_tokens(config)
    new_width, new_height, left, top = width, height, 0.0, 0.0
    if getattr(processor, "do_pad", False):
        new_width = new_height = max(width, height)
        left, top = (new_width - width) // 2, (new_height - height) // 2
    padded_width, padded_height = new_width, new_height
    if processor.do_resize:
        new_width, new_height = _resized(processor.size, padded_width, padded_height)
    scale_x, scale_y = new_width / padded_width, new_height / padded_height
    x, y = Axis(scale_x, left * scale_x), Axis(scale_y, top * scale_y)
    if processor.do_center_crop:
        crop = processor.crop_size
        x, y = x.moved(_cropped(new_width, crop["width"])), y.moved(_cropped(new_height, crop["height"]))
        new_width, new_height = crop["width"], crop["height"]
    _check_tower(config, new_width, new_height)
    grid = Grid.over(x, y, new_height // vision.patch_size, new_width // vision.patch_size, vision.patch_size)
    return Layout.of((grid, [(NO_CELL, NO_CELL)] * before + raster(grid)))


def _llava_next(config: PretrainedConfig, processor: Any, width: int, height: int, count: int) -> Layout:
    if _class_tokens(config):
        raise GranaryError("vision_feature_select_strategy=full of LLaVA-NeXT: its CLS tokens have no known place")
    return tiled(width, height, best=_best(config, processor, width, height), **_tile(config, processor))


def _onevision(config: PretrainedConfig, processor: Any, width: int, height: int, count: int) -> Layout:
    if _class_tokens(config):
        raise GranaryError("LLaVA-OneVision with a CLS token: its tokens have no known place")
    if count > 1:
        return one_tile(width, height, **_tile(config, processor))
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    best = _best(config, processor, width, height)
    return tiled(width, height, best=best, most_tiles=most, **_tile(config, processor))


def _qwen(config: PretrainedConfig, processor: Any, width: int, height: int, count: int) -> Layout:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    cell, size = processor.patch_size * processor.merge_size, processor.size
    new_width, new_height = width, height
    if processor.do_resize:
        new_height, new_width = smart_resize(
            height, width, factor=cell, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
        )
    x, y = Axis.stretched(width, new_width), Axis.stretched(height, new_height)
    grid = Grid.over(x, y, new_height // cell, new_width // cell, cell)
    return Layout.of((grid, raster(grid)))


def _gemma3(config: PretrainedConfig, processor: Any, width: int, height: int, count: int) -> Layout:
    if processor.do_pan_and_scan:
        raise GranaryError("do_pan_and_scan of Gemma 3's image processor: crops as further images are not supported")
    side = isqrt(config.mm_tokens_per_image)
    new_width, new_height = _resized(processor.size, width, height)
    _check_tower(config, new_width, new_height)
    grid = Grid.over(Axis.stretched(width, new_width), Axis.stretched(height, new_height), side, side, new_width / side)
    return Layout.of((grid, raster(grid)))


def _class_tokens(config: PretrainedConfig) -> int:
    """Tokens that the tower puts before the patches and the projector keeps: 1 or 0."""
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower == "clip_vision_model":
        return int(strategy == "full")
    if tower == "siglip_vision_model" and strategy == "full":
        return 0
    raise GranaryError(
        f"a {tower} tower with vision_feature_select_strategy={strategy}: its tokens have no known place"
    )


def _check_tower(config: PretrainedConfig, width: int, height: int) -> None:
    size = config.vision_config.image_size
    if (width, height) != (size, size):
        raise GranaryError(
            f"the image processor makes {width} x {height} pixels, the vision tower takes {size} x {size}"
        )


def _resized(size: Any, width: int, height: int) -> tuple[int, int]:
    """Width and height after the image processor's resize: to a size, or of the shorter edge."""
    if size.get("height") and size.get("width"):
        return size["width"], size["height"]
    edge = size.get("shortest_edge")
    if not edge or size.get("longest_edge"):
        raise GranaryError(f"the image processor's size {dict(size)} is not known: height and width, or shortest_edge")
    short, long = min(width, height), max(width, height)
    new_long = int(edge * long / short)
    if edge * new_long > MOST_RESIZED:
        raise GranaryError(f"{width} x {height} pixels are too long a shape: resized to {edge} x {new_long}")
    return (edge, new_long) if width <= height else (new_long, edge)


def _cropped(size: int, crop: int) -> int:
    """Pixels that a centre crop puts before the first, negative where it cuts, rounded as the image processors do."""
    return -((size - crop) // 2)


def _tile(config: PretrainedConfig, processor: Any) -> dict[str, int]:
    """Side of a tile and of a patch, where image processor and tower agree on them."""
    tile, size = config.vision_config.image_size, processor.size
    edges = {size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge")}
    if processor.do_center_crop:
        edges |= {processor.crop_size["height"], processor.crop_size["width"]}
    if edges != {tile}:
        raise GranaryError(f"the image processor cuts tiles of {edges} pixels, the vision tower takes {tile}")
    return {"tile": tile, "patch": config.vision_config.patch_size}


def _best(config: PretrainedConfig, processor: Any, width: int, height: int) -> tuple[int, int]:
    """Height and width of the mosaic that suits the image, of those that model and image processor both know."""
    from transformers.image_processing_utils import select_best_resolution

    known = [tuple(point) for point in processor.image_grid_pinpoints]
    if known != [tuple(point) for point in config.image_grid_pinpoints]:
        raise GranaryError("image_grid_pinpoints of the image processor and of the model differ")
    best = select_best_resolution((height, width), known)
    if best is None:
        raise GranaryError(f"{width} x {height} pixels are too long a shape for any of the tiles")
    return best[0], best[1]


_QWEN = VisionFamily(
    layout=_qwen, type_ids="mm_token_type_ids", structure=("vision_start_token_id", "vision_end_token_id")
)
FAMILIES: dict[str, VisionFamily] = {
    "llava": VisionFamily(layout=_llava),
    "llava_next": VisionFamily(layout=_llava_next),
    "llava_onevision": VisionFamily(layout=_onevision, nested=True),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "gemma3": VisionFamily(
        layout=_gemma3,
        type_ids="token_type_ids",
        structure=("boi_token_id", "eoi_token_id"),
        placeholder="boi_token_id",
        wrapped=True,
    ),
}
