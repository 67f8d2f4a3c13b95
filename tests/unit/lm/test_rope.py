"""Rope variants that look at the longest position of a forward: angles of a document are a function of the document."""

import pytest
import torch
from transformers import AutoModel, Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig

from shared.lm.hookpoint import HookPoint
from shared.lm.isolation import measure_isolation
from shared.lm.packed import DOCUMENT_SDPA
from shared.lm.rope import rotate_by_document
from tests.families import GQA, HEADS

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "long_factor": [1.0, 2.0, 8.0, 16.0],
    "short_factor": [1.0, 1.01, 1.02, 1.03],
}
LENGTHS = (5, 30, 3, 16, 17)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def build(attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Phi3Config(**GQA, rope_parameters=LONGROPE, original_max_position_embeddings=16)
    return AutoModel.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ["eager", DOCUMENT_SDPA])
@pytest.mark.parametrize(("seq_len", "batch_contexts"), [(128, 1), (32, 3)])
def test_documents_on_both_sides_of_the_original_length(attention: str, seq_len: int, batch_contexts: int) -> None:
    """In one context, and in contexts of one forward."""
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]
    hooks = [HookPoint(layer, "resid_post") for layer in range(3)]
    found = []
    for by_document in (False, True):
        model = build(attention)
        if by_document:
            rotate_by_document(model)
        found.append(measure_isolation(model, hooks, documents, seq_len=seq_len, batch_contexts=batch_contexts))
    plain, mended = found
    assert not plain.holds
    assert mended.holds
    assert mended.worst < 1e-5


def test_angles_are_those_of_each_document_alone() -> None:
    model = build("eager")
    plain = build("eager").rotary_emb
    rotate_by_document(model)
    x = torch.zeros(2, sum(LENGTHS), 16)
    row = torch.cat([torch.arange(length) for length in LENGTHS])
    positions = torch.stack([row, torch.arange(len(row))])
    for got, wanted in zip(model.rotary_emb(x, positions), plain(x[:1], positions[1:]), strict=True):
        assert torch.equal(got[1:], wanted)
    start = 0
    for length in LENGTHS:
        alone = plain(x[:1], torch.arange(length)[None])
        for got, wanted in zip(model.rotary_emb(x, positions), alone, strict=True):
            assert torch.equal(got[:1, start : start + length], wanted)
        start += length


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**{**GQA, "max_position_embeddings": 16}, rope_parameters=DYNAMIC),
        Gemma3TextConfig(
            **{**HEADS, "max_position_embeddings": 16},
            query_pre_attn_scalar=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ],
)
def test_a_document_is_not_changed_by_those_run_before_it(config: PretrainedConfig) -> None:
    """dynamic rope keeps the frequencies of the longest sequence that it has met."""

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModel.from_config(config).eval().requires_grad_(False)

    plain, mended = fresh(), fresh()
    rotate_by_document(mended)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 50, (1, length), generator=generator) for length in (30, 20, 16, 15, 40, 25)]
    changed = False
    for tokens in documents:
        alone = fresh()(tokens, use_cache=False).last_hidden_state
        changed |= not torch.equal(plain(tokens, use_cache=False).last_hidden_state, alone)
        assert torch.equal(mended(tokens, use_cache=False).last_hidden_state, alone)
    assert changed
