"""Small random vision-language models of several families, each with a row of text around one image."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from tests.modules import llava

IMAGE, START, END, VIDEO, VOCAB, LAYERS = 45, 46, 47, 48, 50, 4
GRID = (1, 4, 6)  # patches in time, height and width, of which 2 x 2 make a token: 6 tokens
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def qwen(kind: type, vision: dict[str, Any]) -> Callable[[], PreTrainedModel]:
    """A model of the Qwen family."""

    def make() -> PreTrainedModel:
        text = {**TEXT, "rope_parameters": ROPE}
        return make_seeded(kind(text_config=text, vision_config={"patch_size": 4, "depth": 3, **vision}, **TOKENS))

    return make


def gemma() -> PreTrainedModel:
    """Gemma 3, whose projector would be zero."""
    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    text = {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8}
    model = make_seeded(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE,
                     boi_token_index=START, eoi_token_index=END)
    )  # fmt: skip
    model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    return model


def make_seeded(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


def ids_around(images: int) -> Tensor:
    """BOS and text, the image's tokens between their marks, and text."""
    return torch.tensor([[1, 7, 8, START, *[IMAGE] * images, END, 9, 10]])


def qwen_inputs() -> dict[str, Tensor]:
    """One image of six tokens."""
    ids, patches = ids_around(6), GRID[1] * GRID[2]
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_grid_thw": torch.tensor([GRID]), "mm_token_type_ids": (ids == IMAGE).long(),
    }  # fmt: skip


def gemma_inputs() -> dict[str, Tensor]:
    """One image of four tokens."""
    ids = ids_around(4)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
            "token_type_ids": (ids == IMAGE).long()}  # fmt: skip


def llava_with_image() -> dict[str, Tensor]:
    """LLaVA's image token is another."""
    ids = torch.tensor([[1, 7, 49, 49, 49, 49, 9, 10]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


VISION_2 = {"embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
VISION_25 = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 16,
             "fullatt_block_indexes": [1], "window_size": 16}  # fmt: skip
VISION_3 = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 16,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], dict[str, Tensor]]]] = {
    "llava": (llava, llava_with_image),  # type: ignore[dict-item]
    "qwen2_vl": (qwen(Qwen2VLConfig, VISION_2), qwen_inputs),
    "qwen2_5_vl": (qwen(Qwen2_5_VLConfig, VISION_25), qwen_inputs),
    "qwen3_vl": (qwen(Qwen3VLConfig, VISION_3), qwen_inputs),
    "gemma3": (gemma, gemma_inputs),
}
