"""Small models of many kinds, each with its inputs and the places of it that tests attach to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from shared.sae import SAE, SAEConfig
from tests.splicing import prompt, tiny_llama

Inputs = dict[str, Any]


class Case(NamedTuple):
    """A model, what it is called with, and a place of it with its width and the rows that one forward gives there."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    target: str
    width: int
    rows: int


class MLP(nn.Module):
    """Two linear layers with a norm, dropout and running statistics between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 5)
        self.drop, self.batch_norm = nn.Dropout(0.5), nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop(self.batch_norm(self.norm(self.fc1(x).relu()))))
        return out


class ConvNet(nn.Module):
    """Two convolutions in a block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 9, 3, padding=1))
        self.head = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stage(x).mean((-2, -1)))
        return out


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same weights each time, without dropout and gradient."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)

    return made


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def planted_rows(count: int = 40, rows: int = 24, width: int = 6) -> list[Tensor]:
    """Batches of rows that are sums of a few directions."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(12, width, generator=generator)
    picks = torch.randint(12, (count * rows, 2), generator=generator)
    return list(directions[picks].sum(1).split(rows))


def sae_of(width: int, seed: int = 0) -> SAE:
    """An SAE of random weights."""
    config = SAEConfig(d_model=width, d_latent=3 * width, k=3, normalisation="none")
    return SAE(config, generator=torch.Generator().manual_seed(seed)).requires_grad_(False)


def vit() -> nn.Module:
    return ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
                  patch_size=8), add_pooling_layer=False,
    )  # fmt: skip


def whisper() -> WhisperEncoder:
    config = WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config).get_encoder()


def llava() -> nn.Module:
    text = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=8, projection_dim=12)  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=49))


def llava_inputs() -> Inputs:
    """One image of four tokens between text, and a row with padding on the left."""
    ids = torch.tensor([[1, 49, 49, 49, 49, 7, 8, 9], [0, 0, 1, 49, 49, 49, 49, 5]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": noise(2, 3, 16, 16)}


def text() -> Inputs:
    return {"input_ids": prompt()}


CASES = {
    "linear": Case(seeded(MLP), lambda: {"x": noise(4, 6)}, "fc1", 12, 4),
    "linear_input": Case(seeded(MLP), lambda: {"x": noise(4, 6)}, "fc2:in", 12, 4),
    "layer_norm": Case(seeded(MLP), lambda: {"x": noise(4, 6)}, "norm", 12, 4),
    "conv": Case(seeded(ConvNet), lambda: {"x": noise(2, 3, 4, 5)}, "stage.2", 9, 40),
    "conv_input": Case(seeded(ConvNet), lambda: {"x": noise(2, 3, 4, 5)}, "stage.2:in", 7, 40),
    "channels_first": Case(seeded(ConvNet), lambda: {"x": noise(2, 3, 4, 5)}, "stage@1", 9, 40),
    "vit_block": Case(seeded(vit), lambda: {"pixel_values": noise(2, 3, 16, 16)}, "layers.1", 16, 10),
    "whisper_layer": Case(seeded(whisper), lambda: {"input_features": noise(2, 8, 40)}, "layers.0", 16, 40),
    "whisper_tuple": Case(seeded(whisper), lambda: {"input_features": noise(2, 8, 40)}, "layers.0.self_attn", 16, 40),
    "whisper_keyword": Case(
        seeded(whisper), lambda: {"input_features": noise(2, 8, 40)}, "layers.0.self_attn:in", 16, 40
    ),
    "whisper_conv": Case(seeded(whisper), lambda: {"input_features": noise(2, 8, 40)}, "conv2", 16, 40),
    "decoder_layer": Case(tiny_llama, text, "model.layers.1", 16, 12),
    "decoder_site": Case(tiny_llama, text, "layers.1.resid_mid", 16, 12),
    "decoder_head": Case(tiny_llama, text, "lm_head:in", 16, 12),
    "vlm_text_layer": Case(seeded(llava), llava_inputs, "model.language_model.layers.1", 16, 12),
    "vlm_vision_layer": Case(seeded(llava), llava_inputs, "re:model.vision_tower.*layers.0", 12, 10),
}
