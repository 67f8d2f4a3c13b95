"""What a vision-language model's folder says of images: layouts of their tokens, and the inputs of a forward.

The image processor alone runs, on pillow, in every family: the processors around it want torchvision, whose pixels
differ from pillow's by rounding. What they add (placeholders, type ids) is added here.

Shapes: L tokens of one row.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shared.basics.documents import read_json, typed_at
from shared.basics.errors import GranaryError, told_of
from shared.basics.images import pillow
from shared.lm.identity import load_trunk_config, quiet_transformers, resolve_model
from shared.lm.vision.families import FAMILIES, VisionFamily
from shared.lm.vision.layout import Layout
from shared.lm.vision.shown import Shown, size_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class VisionReader:
    """The image side of one model."""

    config: PretrainedConfig
    family: VisionFamily
    processor: Any
    """Its image processor, on pillow."""
    chat_template: str | None
    """That of its processor, where the folder has one beside the tokenizer's (chat_template.json)."""

    @classmethod
    def load(cls, path: str, revision: str | None = None) -> "VisionReader":
        """That of the model at `path` (see `resolve_model`).

        Raises GranaryError for a model that reads no images, one of a family without a row, and a folder without an
        image processor.
        """
        config = load_trunk_config(path, revision)
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise GranaryError(
                f"model {path} is a {config.model_type}: rows with images are known for {', '.join(FAMILIES)}"
            )
        pillow()
        # Not by way of the package, which gives a substitute where torchvision is missing.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        with quiet_transformers():
            try:
                processor = AutoImageProcessor.from_pretrained(
                    resolve_model(path, revision), backend="pil", trust_remote_code=False
                )
            except Exception as error:  # of several libraries, from files that may hold anything
                raise GranaryError(f"model {path} has no image processor that loads: {told_of(error)}") from error
        reader = cls(config, family, processor, _chat_template(resolve_model(path, revision)))
        reader.layout(64, 48, 1, f"model {path}")  # refuses settings that no image would suit
        return reader

    @property
    def image_id(self) -> int:
        """The token at whose places the model puts the features of images."""
        return int(self.config.image_token_id)

    @property
    def placeholder_id(self) -> int:
        """The token that stands for one image in the text of a chat template."""
        return int(getattr(self.config, self.family.placeholder))

    @property
    def structure_ids(self) -> tuple[int, ...]:
        """Tokens that stand around an image."""
        return tuple(int(getattr(self.config, key)) for key in self.family.structure)

    def identity(self) -> dict[str, Any]:
        """JSON for a store's plan: the family and the hash of the image processor's settings."""
        settings = {key: value for key, value in self.processor.to_dict().items() if key != "transformers_version"}
        text = json.dumps(settings, sort_keys=True, default=str)
        return {"family": self.config.model_type, "processor_hash": hashlib.sha256(text.encode()).hexdigest()}

    def wrapped(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What takes the placeholder's place in the text, with one image token for all of an image."""
        image, *marks = map(tokenizer.convert_ids_to_tokens, (self.image_id, *self.structure_ids))
        return f"\n\n{marks[0]}{image}{marks[1]}\n\n" if self.family.wrapped else str(image)

    def layout(self, width: int, height: int, count: int, where: str) -> Layout:
        """The tokens of an image of that size, one of `count` in its row.

        Raises GranaryError naming `where` for a shape that the image processor refuses.
        """
        try:
            return self.family.layout(self.config, self.processor, width, height, count)
        except (GranaryError, ValueError) as error:
            raise GranaryError(f"{where}: {told_of(error)}") from error

    def shown(self, rows: Sequence[Sequence["Image | tuple[int, int]"]]) -> Shown:
        """What the images of each row of a batch show: PIL images, upright, or their width and height in pixels.

        Raises GranaryError for what is no image and for a shape that the image processor refuses.
        """
        sizes = tuple(tuple(map(size_of, row)) for row in rows)
        if not sizes:
            raise GranaryError("no rows: give the images of each row of the batch, as in shown([[image]])")
        layouts = tuple(
            tuple(self.layout(*size, len(row), f"image {number} of row {place}") for number, size in enumerate(row))
            for place, row in enumerate(sizes)
        )
        return Shown(self.config.model_type, self.image_id, sizes, layouts)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, text: str, images: Sequence["Image"]) -> dict[str, Any]:
        """The arguments of the model's forward for a text with one placeholder for each of `images`, RGB and upright.

        The text is what the chat template makes. Raises GranaryError for another number of images than placeholders.
        """
        placeholder = str(tokenizer.convert_ids_to_tokens(self.placeholder_id))
        text = text.replace(placeholder, self.wrapped(tokenizer))
        ids_L = torch.tensor(placeholder_encoder(tokenizer).encode(text, add_special_tokens=False).ids)
        is_image_L = ids_L == self.image_id
        if int(is_image_L.sum()) != len(images):
            raise GranaryError(
                f"the text has {int(is_image_L.sum())} placeholders ({placeholder}), and {len(images)} images are given"
            )
        counts_L = torch.ones_like(ids_L)
        layouts = [self.layout(*image.size, len(images), f"image {number}") for number, image in enumerate(images)]
        counts_L[is_image_L] = torch.tensor([len(layout) for layout in layouts], dtype=counts_L.dtype)
        return self.inputs(ids_L.repeat_interleave(counts_L), images)

    def inputs(self, ids_L: Tensor, images: Sequence["Image"]) -> dict[str, Any]:
        """Keyword arguments of the model's forward for one row, int64 `ids_L` and its images in order; on the CPU."""
        ids_1L = ids_L[None]
        given: dict[str, Any] = {
            "input_ids": ids_1L,
            "attention_mask": torch.ones_like(ids_1L),
            "use_cache": False,
        }
        if self.family.type_ids is not None:
            given[self.family.type_ids] = (ids_1L == self.image_id).long()
        if images:
            listed = [list(images)] if self.family.nested else list(images)
            made = self.processor(images=listed, return_tensors="pt")
            given |= {name: value for name, value in made.items() if name != "num_crops"}
        return given


def placeholder_encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that takes the names of special tokens in a text for these: a placeholder is no text."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = False
    return encoder


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    return str(typed_at(read_json(file), "chat_template", str, file))
