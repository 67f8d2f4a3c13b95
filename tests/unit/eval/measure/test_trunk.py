"""Passes that begin behind the layers they share with the clean one: the same bits, and less work."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from shared.sae.contexts import Given
from shared.sae.sites import Sites
from stage_eval.measure.downstream import CLEAN, Condition, Splice, Trunk, check_splices
from tests.splicing import D, final_hidden, packed_batch, tiny_llama

LAYERS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.4, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4},
    "gpt_neox": {"num_key_value_heads": 2},
    "qwen3": {},
    "gpt2": {"n_embd": D, "n_layer": LAYERS, "n_head": 2, "n_positions": 32, "vocab_size": 50},
}


def bent(x: Given) -> Tensor:
    """In place of a reconstruction: nothing of the clean activation is left as it was."""
    assert isinstance(x, Tensor)
    return 0.5 * x + 0.1


def condition(site: str, *more: str) -> Condition:
    return Condition(site, tuple(Splice(Sites.of(name), bent) for name in (site, *more)))


CONDITIONS = {
    condition(*sites): depth
    for sites, depth in {
        ("layers.0.resid_pre",): 0,
        ("layers.0.resid_post",): 1,
        ("layers.1.attn_out",): 1,
        ("layers.1.mlp_out",): 1,
        ("layers.1.resid_post",): 2,
        ("layers.2.resid_mid",): 2,
        ("layers.2.resid_post",): 3,
        ("layers.2.resid_post", "layers.1.resid_post"): 2,
    }.items()
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@torch.inference_mode()
@pytest.mark.parametrize("packing", ["isolated", "joined", "separate"])
def test_every_pass_ends_as_a_whole_one(model: LlamaForCausalLM, packing: str) -> None:
    assert [one.depth for one in CONDITIONS] == list(CONDITIONS.values())
    depths = check_splices(model, [Condition(CLEAN), *CONDITIONS])
    assert depths == {1, 2, 3}
    run = packed_batch(packing)
    trunk = Trunk(model, run, depths)
    clean = trunk.final_hidden(Condition(CLEAN))
    assert torch.equal(clean, final_hidden(model, run, Condition(CLEAN)))
    for one in CONDITIONS:
        expected = final_hidden(model, run, one)
        assert torch.equal(trunk.final_hidden(one), expected), one.name
        assert not torch.equal(expected, clean), one.name
    assert torch.equal(final_hidden(model, run, Condition(CLEAN)), clean), "something was left on the model"


@torch.inference_mode()
def test_the_shared_layers_run_once(model: LlamaForCausalLM) -> None:
    ran: Counter[int] = Counter()
    handles = [
        block.mlp.register_forward_hook(lambda *_, number=number: ran.update([number]))
        for number, block in enumerate(model.model.layers)
    ]
    trunk = Trunk(model, packed_batch("isolated"), {1, 2, 3})
    for one in (Condition(CLEAN), *CONDITIONS):
        trunk.final_hidden(one)
    for handle in handles:
        handle.remove()
    assert ran == {layer: 1 + sum(depth <= layer for depth in CONDITIONS.values()) for layer in range(LAYERS)}


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    chosen = [condition(f"layers.{layer}.resid_post") for layer in range(LAYERS)]
    depths = check_splices(model, [Condition(CLEAN), *chosen])
    assert depths == {1, 2, 3}
    trunk = Trunk(model, run := packed_batch("joined"), depths)
    trunk.final_hidden(Condition(CLEAN))
    for one in chosen:
        assert torch.equal(trunk.final_hidden(one), final_hidden(model, run, one))


@pytest.mark.parametrize("fails", [False, True])
def test_layers_that_share_more_than_the_stream_run_in_every_pass(fails: bool) -> None:
    """As keys of an earlier layer are shared: a later one is another without it, or can't run."""
    model = tiny_llama()
    shared: dict[str, Tensor] = {}
    first, last = model.model.layers[0], model.model.layers[2]
    first.mlp.register_forward_hook(lambda _module, _args, output: shared.update(kept=output))
    last.mlp.register_forward_hook(
        lambda _module, _args, output: output + (shared.pop("kept") if fails else shared.pop("kept", 0.0))
    )
    assert check_splices(model, [Condition(CLEAN), *CONDITIONS]) == {3}
