"""Memory of a frozen base from its config.json: against the formula of its shapes, and models that are really made."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Gemma2Config, LlamaConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from shared.basics.errors import GranaryError
from shared.lm.base_memory import base_memory

# As Qwen2.5-VL-72B's config.json has it.
TEXT = {
    "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152064,
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16, "out_hidden_size": 8192,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50,
}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> str:
    Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_text_stack_of_a_72b_model_is_what_its_shapes_say(large: str) -> None:
    d, m, v, kv = 8192, 29568, 152064, 8 * 128
    linear = d * d + d + 2 * (d * kv + kv) + d * d + 3 * d * m
    for layer, layers in ((32, 33), (None, 80)):
        found = base_memory(large, ranks=8, layer=layer, dtype="bfloat16")
        assert (found.layers, found.of_layers) == (layers, 80)
        assert found.split == 2 * layers * linear // 8
        assert found.whole == 2 * (v * d + layers * 2 * d)
    h, i = 1280, 3456
    block = 3 * h * h + 3 * h + h * h + h + 3 * h * i + 2 * i + h + 2 * h
    tower = 32 * block + 3 * 2 * 14 * 14 * h + h + (4 * h) ** 2 + 4 * h + 4 * h * 8192 + 8192
    assert found.tower == 2 * tower
    whole = base_memory(large, ranks=1)
    assert whole.split == 0
    assert whole.total == pytest.approx(2 * (80 * (linear + 2 * d) + v * d + tower))
    # 72.7 B parameters less the head, in bfloat16.
    assert whole.whole / 2 == pytest.approx(72.7e9 - v * d, rel=0.01)


def test_an_embedding_that_the_plan_splits_counts_by_the_part_of_a_rank(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, head_dim=8)
    config.save_pretrained(tmp_path)
    whole, split = (base_memory(str(tmp_path), ranks=ranks, dtype="float32") for ranks in (1, 2))
    assert whole.split == 0
    kept = 4 * (4 * config.num_hidden_layers) * config.hidden_size  # norms
    if "embed_tokens" not in config.base_model_tp_plan:  # as the installed transformers has it
        kept += 4 * config.vocab_size * config.hidden_size
    assert (split.whole, 2 * split.split) == (kept, whole.whole - kept)


def test_it_is_what_a_model_that_is_made_takes(tmp_path: Path) -> None:
    for config in (LlamaConfig(**SMALL), Qwen2_5_VLConfig(text_config=SMALL, vision_config={**VISION, "depth": 1})):
        config.save_pretrained(tmp_path)
        cut = AutoModel.from_config(config).eval()
        text = cut.language_model if hasattr(cut, "language_model") else cut
        text.layers, text.norm = text.layers[:3], torch.nn.Identity()
        held = sum(weight.numel() * weight.element_size() for weight in cut.parameters())
        assert base_memory(str(tmp_path), ranks=1, layer=2, dtype="float32").total == held


def test_what_can_not_be_split_or_had_is_one_line(large: str, tmp_path: Path) -> None:
    (tmp_path / "qwen3").mkdir()
    Qwen3VLConfig(text_config=SMALL).save_pretrained(tmp_path / "qwen3")
    for settings, told in (
        (
            {"path": str(tmp_path / "qwen3"), "layer": None},
            "transformers has no tensor-parallel plan for qwen3_vl_text",
        ),
        ({"tensor_parallel": 3}, "tensor_parallel=3 does not divide the model's 8 key/value heads"),
        ({"tensor_parallel": 7}, "base_tensor_parallel=7 does not divide the 24 ranks"),
        ({"layer": 80}, "base_layer=80: .* has 80 layers, 0 to 79"),
        ({"dtype": "int3"}, "base_dtype=int3: choose from"),
        ({"path": str(tmp_path / "nowhere")}, r"no config\.json that transformers can read"),
    ):
        given = {"path": large, "ranks": 24, "tensor_parallel": 8, "layer": 32, **settings}
        with pytest.raises(GranaryError, match=told):
            base_memory(given.pop("path"), **given)  # type: ignore[arg-type]
