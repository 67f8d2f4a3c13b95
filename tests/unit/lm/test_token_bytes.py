"""Bytes of tokens against the text they came from, and logit weights against the model's own head."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from shared.lm import load_causal_lm, load_tokenizer
from shared.lm.head import load_head
from shared.lm.token_bytes import token_bytes

TEXTS = ("def f(self):\n\treturn 'é'  # 日本 😀\r\n", "  leading spaces", "a\u200bb \u202e & </script> <s>")


def joined(tokenizer: PreTrainedTokenizerBase, text: str) -> bytes:
    table = token_bytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return b"".join(table[token] for token in ids)


def test_byte_level_tokens_are_the_bytes_of_the_text() -> None:
    tokenizer = load_tokenizer("bundled")
    assert [joined(tokenizer, text) for text in TEXTS] == [text.encode() for text in TEXTS]
    table = token_bytes(tokenizer)
    assert table[tokenizer.bos_token_id] == b"<s>"
    assert len(table) == len(tokenizer)


def test_sentencepiece_tokens_are_the_bytes_of_the_text_behind_a_space(realdata: Path) -> None:
    tokenizer = load_tokenizer(str(realdata / "stories260K-hf"))
    assert [joined(tokenizer, text) for text in TEXTS] == [b" " + text.encode() for text in TEXTS]
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("<0x0A>")] == b"\n"


def test_logit_weights_have_the_final_norm_in_them() -> None:
    model, head = load_causal_lm("bundled"), load_head("bundled")
    D = model.config.hidden_size
    directions = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    x = torch.randn(D, generator=torch.Generator().manual_seed(1))
    norm = model.model.norm
    # In a direction that leaves the RMS as it is, the logits move by the weights over the RMS.
    for d in directions:
        d = d - x * (d @ x) / (x @ x)
        rms = x.square().mean().sqrt()
        moved = model.lm_head(norm((x + 1e-3 * d)[None]) - norm((x - 1e-3 * d)[None]))[0] / 2e-3 * rms
        expected = moved - moved.mean()
        found = head.weights(d[None])[0]
        assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
        assert found.mean().abs() < 1e-5
    assert not head.is_centred
    plain = (directions @ model.lm_head.weight.T)[0]
    assert not torch.allclose(head.weights(directions)[0], plain - plain.mean(), rtol=0.1)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2"])
def test_the_gain_of_any_norm(kind: str, tmp_path: Path) -> None:
    """LayerNorm takes off the mean; Gemma's norm multiplies by 1 + its weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    extra = {"head_dim": 8, "num_key_value_heads": 2} if kind == "gemma2" else {}
    config = AutoConfig.for_model(kind, vocab_size=40, **sizes, **extra)
    model = AutoModelForCausalLM.from_config(config)
    norm = model.model.norm if kind == "gemma2" else model.gpt_neox.final_layer_norm
    torch.nn.init.normal_(norm.weight)
    model.save_pretrained(tmp_path)
    head = load_head(str(tmp_path))
    gain = 1 + norm.weight if kind == "gemma2" else norm.weight
    assert head.is_centred == (kind == "gpt_neox")
    assert torch.allclose(head.gain_D, gain.detach(), atol=1e-3)
