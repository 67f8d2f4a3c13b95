"""Splicing and steering with every kind of dictionary: at the sites it records, by the latents of all its groups."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from shared.basics.errors import GranaryError
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.sae.contexts import Contexts
from shared.sae.learn.init import initialise
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import Dictionary, MoLT
from tests.dense import maps
from tests.splicing import ATTENTION, BOS, D, prompt, tiny_llama
from tests.variants import make

SITES = {
    "sae": Sites.of("layers.1.resid_post"),
    "transcoder": Sites(("layers.1.mlp_in",), ("layers.1.mlp_out",)),
    "skip_transcoder": Sites(("layers.1.mlp_in",), ("layers.1.mlp_out",)),
    "molt": Sites(("layers.1.mlp_in",), ("layers.1.mlp_out",)),
    "crosscoder": Sites(("layers.0.mlp_in", "layers.1.mlp_in"), ("layers.1.mlp_out", "layers.2.mlp_out")),
    "clt": Sites(tuple(f"layers.{n}.mlp_in" for n in range(3)), tuple(f"layers.{n}.mlp_out" for n in range(3))),
    "lorsa": ATTENTION,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


def activations(model: LlamaForCausalLM, names: tuple[str, ...], tokens: Tensor) -> Tensor:
    """Of the clean model, side by side [B, T, sum of widths]."""
    hooks = [HookPoint.parse(name) for name in names]
    with torch.no_grad(), capture(model, hooks) as seen:
        model(tokens)
    return torch.cat([seen[hook] for hook in hooks], -1)


def fitted(model: LlamaForCausalLM, kind: str, **given: Any) -> Dictionary:
    """One of the kind, with the normalisation of the model's own activations."""
    sites = SITES[kind]
    widths = SiteWidths((D,) * len(sites.reads), (D,) * len(sites.writes))
    activation = "batchtopk" if kind == "clt" else "topk"
    if kind == "molt":
        given["ranks"] = {4: 6, 2: 18, 1: 36}
    objective = make(kind, places=(sites, widths), d_latent=60, activation=activation, **given)
    tokens = prompt(8, 12)
    x, y = (activations(model, names, tokens) for names in (sites.reads, sites.writes))
    given_x = Contexts.whole(x) if kind == "lorsa" else x.flatten(0, 1)
    initialise(objective, None, given_x, None, y.flatten(0, 1))
    return objective.dictionary.requires_grad_(False)


@pytest.mark.parametrize("kind", SITES)
@torch.no_grad()
def test_without_edits_the_logits_are_the_model_s(model: LlamaForCausalLM, kind: str) -> None:
    made = fitted(model, kind)
    tokens = prompt()
    clean = model(tokens).logits
    with SplicedModel(model, made) as spliced:
        assert torch.equal(spliced(tokens).logits, clean)
        before = spliced.features.before
    x = activations(model, SITES[kind].reads, tokens)
    torch.testing.assert_close(before.to_dense(60), made.encode(x).to_dense(60), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens).logits, clean)


@pytest.mark.parametrize("kind", SITES)
@torch.no_grad()
def test_an_edit_adds_what_the_latent_writes(model: LlamaForCausalLM, kind: str) -> None:
    """Its row, or its map of what each token read. The first written site shows it alone: what comes later sees
    a changed stream."""
    made = fitted(model, kind)
    tokens, latent = prompt(), 3
    first = SITES[kind].writes[0]
    y = activations(model, (first,), tokens)
    with (
        SplicedModel(model, made, edits=[Edit([latent], "add", 2.5)]),
        capture(model, [HookPoint.parse(first)]) as seen,
    ):
        model(tokens)
    group = made.groups[0]
    row = torch.zeros(made.widths.d_out)
    if isinstance(group, MoLT):
        row = made.normalise(activations(model, SITES[kind].reads, tokens))[0] @ maps(group)[latent].T
    else:
        row[made.places[0][1]] = group.W_dec[latent]
    moved = 2.5 * (made.denormalise(row) - made.denormalise(torch.zeros_like(row)))[..., :D]
    expected = torch.where((tokens != BOS)[..., None], y + moved, y)
    torch.testing.assert_close(seen[HookPoint.parse(first)], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_layers_of_a_clt_from_the_replaced_stream(model: LlamaForCausalLM) -> None:
    """keep_error=False: each layer encodes what the layers before it have made; the same by hand, layer by layer."""
    made, tokens = fitted(model, "clt"), prompt()
    with SplicedModel(model, made, keep_error=False, include_bos=True) as spliced:
        found = spliced(tokens).logits
        latents = spliced.features.before
    reads = made.widths.reads
    x = torch.zeros(*tokens.shape, made.widths.d_in)

    def give(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            x[..., layer * D : (layer + 1) * D] = args[0]
            return made(x).x_hat[..., layer * D : (layer + 1) * D]

        return hook

    handles = [model.model.layers[layer].mlp.register_forward_hook(give(layer)) for layer in range(3)]
    expected = model(tokens).logits
    for handle in handles:
        handle.remove()
    assert reads == (D, D, D)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.to_dense(60), made.encode(x).to_dense(60), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generates_with_a_cache(model: LlamaForCausalLM) -> None:
    made, tokens = fitted(model, "clt"), prompt()
    with SplicedModel(model, made, edits=[Edit([25], "set", 4.0)]) as spliced:
        out = spliced.generate(tokens, max_new_tokens=4, do_sample=False)
        assert spliced.features.before.values.shape[:2] == (2, out.shape[1] - 1)


def test_what_cannot_be_spliced(model: LlamaForCausalLM) -> None:
    made = fitted(model, "transcoder")
    with pytest.raises(GranaryError, match=r"hook=layers\.1\.mlp_out is for dictionaries of one site"):
        SplicedModel(model, made, "layers.1.mlp_out")
    ahead = make("clt", places=(SITES["clt"], SiteWidths((D,) * 3, (D,) * 3)), activation="topk").dictionary
    with pytest.raises(GranaryError, match=r"layers\.1\.mlp_in is computed after layers\.0\.mlp_out"):
        SplicedModel(model, ahead)(prompt())
