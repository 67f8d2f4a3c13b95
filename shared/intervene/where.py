"""Where an edit acts: on tokens of some kinds, or on regions of an image.

    Edit([17], "set", 8.0, where=Where(image=0, box=(8, 0, 40, 32)))    # in a box of the first image, in pixels
    Edit([17], "set", 8.0, where=Where(kinds=["image"]))                # on all regions of all images

Legend: B rows of a batch, T positions of one forward.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.basics.errors import GranaryError
from shared.intervene.padding import padding_of
from shared.intervene.tokens import special_ids
from shared.lm.calls import filled_slots, named_arguments
from shared.lm.vision.families import FAMILIES
from shared.lm.vision.shown import Box, Regions, Shown

KINDS = ("text", "image", "generated")


@dataclass(frozen=True)
class Where:
    """Tokens of any of `kinds`; or the regions of one image, or those of them that lie in a box."""

    kinds: Sequence[str] = ()
    """``text``: what is neither special nor of an image; ``image``: regions of images; ``generated``: what ``generate``
    has added to its prompt."""
    image: int | None = None
    """Number of an image in its row, from 0; rows that have fewer are left alone."""
    box: Box | None = None
    """Left, top, right and bottom in pixels of the upright image: the regions that lie wholly in it."""

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not set(self.kinds) <= set(KINDS):
            raise GranaryError(f"kinds={self.kinds!r} is not known: give a list of {', '.join(KINDS)}")
        if not self.kinds and self.image is None:
            needed = "a box is in an image: give image=0" if self.box is not None else "give kinds, or image and box"
            raise GranaryError(f"Where() says no place: {needed}")
        if self.kinds and self.image is not None:
            raise GranaryError("kinds and image are two ways to choose tokens: give one of them")
        if self.kinds and self.box is not None:
            raise GranaryError("a box is in an image: give image=0, and no kinds")
        if self.image is not None and (not isinstance(self.image, int) or self.image < 0):
            raise GranaryError(f"image={self.image!r} is no number of an image: they count from 0")
        if self.box is not None:
            _check_box(self.box)

    @property
    def is_about_images(self) -> bool:
        """Whether it takes to know what each image token shows."""
        return self.image is not None or "image" in self.kinds


def _check_box(box: Box) -> None:
    if len(box) != 4 or not all(isinstance(one, int | float) and math.isfinite(one) for one in box):
        raise GranaryError(f"box={box!r}: give left, top, right and bottom, in pixels")
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise GranaryError(f"box={tuple(box)} is empty: give left < right and top < bottom, in pixels")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward of a language model, for `where_masks`."""

    ids_BT: Tensor | None
    """None where embeddings were given."""
    is_padding_BT: Tensor
    is_generated_BT: Tensor | None
    """None where the prompt's length is not known."""
    earlier_BS: Tensor | None
    """Tokens [B, S] of the sequence in forwards before, padding included; None where they are not known."""
    is_end: bool
    """Whether the prompts end in this forward."""


def forward_tokens(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tokens:
    """Those of a forward of which nothing else is known; one that continues no cache is taken to be whole prompts.

    Raises GranaryError where it has neither token ids nor embeddings.
    """
    named = named_arguments(model, args, kwargs)
    ids, past = named.get("input_ids"), filled_slots(named)
    given = ids if ids is not None else named.get("inputs_embeds")
    if given is None:
        raise GranaryError("the model was called without input_ids or inputs_embeds")
    is_padding_BT = padding_of(named.get("attention_mask"), past, given.shape[:2], given.device)
    earlier_BS = None if past else is_padding_BT.new_zeros(len(given), 0, dtype=torch.int64)
    return Tokens(ids, is_padding_BT, None, earlier_BS, is_end=not past)


def where_masks(
    model: PreTrainedModel, wheres: Sequence[Where | None], tokens: Tokens, pictures: Shown | None
) -> list[Tensor | None]:
    """bool [B, T] for each of `wheres`: where it is, padding aside; None for None, which is everywhere.

    Raises GranaryError where that can't be told: without token ids, for images without `pictures` or with others than
    those of the tokens, and for an image or a box that none of them has.
    """
    needed = [where for where in wheres if where is not None]
    if not needed:
        return [None] * len(wheres)
    if tokens.ids_BT is None:
        raise GranaryError("kinds, image and box are told by token ids: give input_ids, not inputs_embeds")
    regions = None
    if any(where.is_about_images for where in needed):
        regions = _regions(model, [where for where in needed if where.is_about_images], tokens, pictures)
    return [None if where is None else _mask(model, where, tokens, regions) for where in wheres]


def _mask(model: PreTrainedModel, where: Where, tokens: Tokens, regions: Regions | None) -> Tensor:
    assert tokens.ids_BT is not None
    if where.image is not None:
        assert regions is not None
        return regions.inside(where.image, where.box)
    found_BT = torch.zeros_like(tokens.is_padding_BT)
    if "image" in where.kinds:
        assert regions is not None
        found_BT |= regions.image_BT >= 0
    if "generated" in where.kinds:
        if tokens.is_generated_BT is None:
            raise GranaryError("kinds=['generated'] needs SplicedModel.generate(...), which knows the prompt")
        found_BT |= tokens.is_generated_BT
    if "text" in where.kinds:
        other = torch.tensor(sorted({*special_ids(model), *_image_ids(model)}), device=tokens.ids_BT.device)
        found_BT |= ~torch.isin(tokens.ids_BT, other)
    return found_BT & ~tokens.is_padding_BT


def _regions(model: PreTrainedModel, wheres: Sequence[Where], tokens: Tokens, pictures: Shown | None) -> Regions:
    assert tokens.ids_BT is not None
    if pictures is None:
        raise GranaryError(
            "regions of images take the images' sizes: give pictures=VisionReader.load(model).shown([[image]])"
        )
    if pictures.family != model.config.model_type:
        raise GranaryError(f"pictures are of a {pictures.family}, the model is a {model.config.model_type}")
    for where in wheres:
        if where.image is not None:
            pictures.check(where.image, where.box)
    is_generated_BT = tokens.is_generated_BT
    if is_generated_BT is None:
        is_generated_BT = torch.zeros_like(tokens.is_padding_BT)
    in_prompt_BT = ~tokens.is_padding_BT & ~is_generated_BT
    has_images = bool(((tokens.ids_BT == pictures.image_id) & in_prompt_BT).any())
    if tokens.earlier_BS is None and has_images:
        raise GranaryError(
            "image tokens that continue a cache can't be told apart: call SplicedModel.generate(...), or give whole"
            " sequences"
        )
    before_B = tokens.ids_BT.new_zeros(len(tokens.ids_BT))
    if tokens.earlier_BS is not None:
        before_B = (tokens.earlier_BS == pictures.image_id).sum(1)
    return pictures.regions(tokens.ids_BT, before_B, in_prompt_BT, is_end=tokens.is_end)


def _image_ids(model: PreTrainedModel) -> set[int]:
    """Tokens that stand for images or around them; none for a model that reads no images."""
    config = model.config
    if getattr(config, "vision_config", None) is None:
        return set()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise GranaryError(f"a {config.model_type} is none of the models whose images are known: {', '.join(FAMILIES)}")
    names = ("image_token_id", "video_token_id", *family.structure)
    return {int(found) for name in names if isinstance(found := getattr(config, name, None), int)}
