"""Modules of decoders as sites of a store: widths without weights, layers, names, and what is refused."""

import pytest
import torch
from transformers import AutoModel, LlamaConfig, MixtralConfig

from shared.basics.errors import GranaryError
from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.lm.module_sites import module_sites
from shared.lm.modulepoint import ModulePoint, site_of
from shared.lm.targets import point_of, resolve
from shared.store.format.site_path import site_path
from tests.families import FAMILIES, GQA, HEADS, MORE_FAMILIES
from tests.splicing import tiny_llama


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_shapes_without_weights_are_those_of_a_forward(family):
    """Of every module of a layer that gives a row per token, in every family."""
    config = {**FAMILIES, **MORE_FAMILIES}[family]()
    model = AutoModel.from_config(config).eval()
    leaves = [name for name, module in model.named_modules() if ".1." in name and not list(module.children())]
    linear = [name for name in leaves if isinstance(model.get_submodule(name), torch.nn.Linear)]
    targets = [*linear, *(f"{name}:in" for name in linear)]
    if not targets:  # GPT-2 has a layer of its own
        targets = [name for name in leaves if name.endswith("c_fc")]
    found = module_sites(config, targets)
    with torch.no_grad(), capture(model, [site.point for site in found]) as captured:
        model(torch.randint(2, 50, (3, 5)), use_cache=False)
    assert len(found) == len(targets) > 0
    for site in found:
        assert captured[site.point].shape == (3, 5, site.width)
        assert site.layer == 1


def test_names_go_to_a_store_and_back():
    for written, name in (
        ("layers.2.mlp", "layers.2.mlp"),
        ("layers.2.mlp:in", "layers.2.mlp-in"),
        ("layers.2.self_attn:out[0]", "layers.2.self_attn-out-0"),
        ("layers.2.self_attn:in[hidden_states]", "layers.2.self_attn-in-hidden_states"),
    ):
        point = ModulePoint.parse(written)
        assert site_of(point) == name
        assert ModulePoint.of_site(name) == point == point_of(name)
        assert site_path(name)
    assert site_of(HookPoint(2, "resid_post")) == "layers.2.resid_post"
    model = tiny_llama()
    for root in (model, model.model):  # a store names modules without the head's prefix
        assert resolve(root, "layers.1.mlp.down_proj-in") == [ModulePoint("layers.1.mlp.down_proj", "input")]


def test_layers_and_prefixes():
    config = LlamaConfig(**GQA)
    (one,), (other,) = (module_sites(config, [name]) for name in ("layers.2.mlp", "model.layers.2.mlp"))
    assert one == other
    assert [site.layer for site in module_sites(config, ["embed_tokens", "re:.*mlp"])] == [None, 0, 1, 2]


def test_what_is_no_site_of_a_store_is_said():
    llama = LlamaConfig(**GQA)
    for config, target, told in (
        (llama, "layers.7.mlp", "has no module layers.7.mlp: did you mean"),
        (llama, "re:.*nothing", "matches no whole path"),
        (llama, "norm", "norm lies outside of the decoder layers"),
        (llama, "layers.1.resid_post", "names layers.1.resid_post, a site"),
        (llama, "rotary_emb:out[0]", r"rotary_emb:out\[0\] gives \[2, 3, 8\]|lies outside"),
        (MixtralConfig(**HEADS, num_local_experts=4), "layers.1.mlp.gate:out[0]", r"gives \[6, 4\] for 2 rows of 3"),
        (llama, "layers.1.mlp:in[nothing]", "there is no tensor of activations"),
    ):
        with pytest.raises(GranaryError, match=told):
            module_sites(config, [target])
