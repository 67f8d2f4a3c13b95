"""Small random vision-language models of every known family, with tokenizer, image processor and template."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from shared.bundled import MODEL_DIR
from tests.vision_language import ROPE, TEXT, VISION_2, VISION_3, VISION_25

MARKS = ["<image>", "<start>", "<end>", "<video>"]
TILES = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 84]]
TEMPLATE = """\
{%- macro shown(content) -%}
{%- if content is string %}{{ content }}{% else %}{% for part in content -%}
{%- if part.type == 'image' %}PLACEHOLDER{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif -%}
{%- endmacro -%}
{{ bos_token }}{% for message in messages %}{{ message.role + ':\\n' }}{% if message.role == 'assistant' -%}
{% generation %}{{ shown(message.content) }}{{ eos_token }}{% endgeneration %}{% else -%}
{{ shown(message.content) }}{% endif %}{% endfor %}"""


def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(MODEL_DIR)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made


def ids_of(made: Any) -> tuple[int, ...]:
    return tuple(made.convert_tokens_to_ids(mark) for mark in MARKS)


def text_of(made: Any, **changes: Any) -> dict[str, Any]:
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
    return {**TEXT, "vocab_size": len(made), "max_position_embeddings": 512, **ids, **changes}


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                            image_size=28, patch_size=7)  # fmt: skip


def _llava(made: Any) -> tuple[Any, Any]:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    config = LlavaConfig(vision_config=_clip(), text_config={"model_type": "llama", **text_of(made)},
                         image_token_index=ids_of(made)[0])  # fmt: skip
    return config, LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def _llava_next(made: Any) -> tuple[Any, Any]:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    config = LlavaNextConfig(vision_config=_clip(), text_config={"model_type": "llama", **text_of(made)},
                             image_token_index=ids_of(made)[0], image_grid_pinpoints=TILES)  # fmt: skip
    size, crop = {"shortest_edge": 28}, {"height": 28, "width": 28}
    return config, LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=TILES)


def _onevision(made: Any) -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    vision = SiglipVisionConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                image_size=28, patch_size=7)  # fmt: skip
    config = LlavaOnevisionConfig(vision_config=vision, text_config={"model_type": "qwen2", **text_of(made)},
                                  image_token_index=ids_of(made)[0], video_token_index=ids_of(made)[3],
                                  image_grid_pinpoints=TILES, vision_aspect_ratio="anyres_max_4")  # fmt: skip
    size = {"height": 28, "width": 28}
    return config, LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=TILES)


def _qwen(kind: type, vision: dict[str, Any]) -> Callable[[Any], tuple[Any, Any]]:
    def make(made: Any) -> tuple[Any, Any]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        image, start, end, video = ids_of(made)
        config = kind(text_config=text_of(made, rope_parameters=ROPE),
                      vision_config={"patch_size": 4, "depth": 3, **vision}, image_token_id=image, video_token_id=video,
                      vision_start_token_id=start, vision_end_token_id=end)  # fmt: skip
        size = {"shortest_edge": 4 * 64, "longest_edge": 30 * 64}
        return config, Qwen2VLImageProcessorPil(size=size, patch_size=4)

    return make


def _gemma(made: Any) -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    image, start, end, _ = ids_of(made)
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    text = text_of(made, query_pre_attn_scalar=8, sliding_window=8)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=image,
                          boi_token_index=start, eoi_token_index=end)  # fmt: skip
    return config, Gemma3ImageProcessorPil(size={"height": 16, "width": 16})


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "qwen2_vl": _qwen(Qwen2VLConfig, VISION_2),
    "qwen2_5_vl": _qwen(Qwen2_5_VLConfig, VISION_25),
    "qwen3_vl": _qwen(Qwen3VLConfig, VISION_3),
    "gemma3": _gemma,
}
PLACEHOLDERS = {"qwen2_vl": "<start><image><end>", "gemma3": "<start>"}
PLACEHOLDERS |= dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), PLACEHOLDERS["qwen2_vl"])


def picture_model(family: str, folder: Path, **text: int) -> PreTrainedModel:
    """The whole model, saved in `folder` with all that reads rows with images; `text` changes its decoder."""
    made = tokenizer()
    made.chat_template = TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS.get(family, "<image>"))
    config, processor = FAMILIES[family](made)
    config.get_text_config().update(text)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    if family == "gemma3":  # whose projector is zero
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    for name, weight in model.named_parameters():  # of the tower: a token is mostly its own patch's
        if name.endswith("self_attn.out_proj.weight"):
            weight.mul_(0.02)
    for part in (model, made, processor):
        part.save_pretrained(folder)
    return model


def quick_first() -> list[Any]:
    """All families as parameters; those that differ least from the first two are slow."""
    quick = ("llava_next", "qwen3_vl")
    return [*quick, *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES if one not in quick)]
