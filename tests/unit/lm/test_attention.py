"""A layer's attention as its own modules say: patterns made from its weights are the model's."""

import pytest
import torch
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.kernels.attention import patterns
from shared.kernels.compute import AUTO
from shared.lm.attention import heads_of, shape_of
from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import hook_at
from shared.lm.places import locate
from tests.families import FAMILIES, GQA, MORE_FAMILIES

T = 12
SCALED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KNOWN = {
    **{name: FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")},
    "gemma": MORE_FAMILIES["gemma"],
    "llama3": lambda: LlamaConfig(
        **GQA, rope_parameters={**SCALED, "original_max_position_embeddings": 8}, attention_bias=True
    ),
}


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModel.from_config(KNOWN[family](), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():  # biases and norms begin at 0 and 1
        if name.endswith("bias") or "q_norm" in name or "k_norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", list(KNOWN))
def test_patterns_are_the_models(family: str) -> None:
    model = tiny(family)
    tokens = torch.randint(3, 50, (2, T))
    for layer in (0, 1):
        seen: list[torch.Tensor] = []
        handle = hook_at(locate(model, HookPoint(layer, "attn_in")), seen.append)
        expected = model(tokens, output_attentions=True, use_cache=False).attentions[layer]
        handle.remove()
        heads, form = heads_of(model, layer).query_key, shape_of(model, layer).form
        found = patterns(seen[0], torch.zeros(2, T, dtype=torch.int64), heads, form, AUTO)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert float(found.diagonal(dim1=2, dim2=3).std()) > 1e-3  # no pattern is that of another by being flat


def test_softcap_and_windows_are_there() -> None:
    assert shape_of(tiny("gemma2"), 0).form.softcap == 50
    assert [shape_of(tiny("gemma2"), layer).form.window for layer in (0, 1)] == [4, None]
    assert shape_of(tiny("mistral"), 1).form.window == 4
    assert shape_of(tiny("qwen3"), 1).form.norm_eps == pytest.approx(1e-6)


def test_values_are_those_of_each_query_head() -> None:
    model = tiny("llama")
    W_V_HED = heads_of(model, 1).W_V_HED
    assert W_V_HED.shape == (2, 8, 16)
    for head in (0, 1):
        assert torch.equal(W_V_HED[head], model.layers[1].self_attn.v_proj.weight)


def test_what_is_not_known_is_one_line() -> None:
    by_length = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = AutoModel.from_config(LlamaConfig(**GQA, rope_parameters=by_length))
    with pytest.raises(GranaryError, match="dynamic RoPE, which depends on the longest sequence"):
        shape_of(model, 0)
    other = AutoModel.from_config(FAMILIES["pythia"]())
    with pytest.raises(GranaryError, match=r"not that of GPTNeoXModel .gpt_neox.: give variant.attention=plain"):
        shape_of(other, 0)
