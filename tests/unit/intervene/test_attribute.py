"""Scores of latents against a dense reference on PyTorch's tape, and gradients against finite differences."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.intervene.attribute import Attribution, attribute
from shared.intervene.edits import Edit
from shared.intervene.splice import SplicedModel
from shared.sae import SAE, SAEConfig
from shared.sae.sites import Sites
from shared.sae.variants.transcoder import Transcoder, TranscoderConfig
from tests.modules import llava, llava_inputs, sae_of, seeded
from tests.splicing import ATTENTION, HOOK, D, attention_itself, prompt, tiny_llama
from tests.variants import make

F = 48


def made(normalisation: str) -> SAE:
    """A random SAE whose normalisation does something."""
    config = SAEConfig(d_model=D, d_latent=F, k=4, normalisation=normalisation, unit_norm_decoder=False)
    sae = SAE(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    sae.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
    if normalisation == "centre_scale":
        sae.input_mean.copy_(torch.linspace(-1, 1, D))
        sae.input_scale.fill_(0.7)
    return sae


def metric(out: Any) -> Tensor:
    return out.logits[0, -1, 7] - 0.5 * out.logits[1, 3, 9]


def decoded(sae: SAE, f_BTF: Tensor, x: Tensor) -> Tensor:
    """The reconstruction by the formulas of the config, with gradient."""
    y = f_BTF @ sae.W_dec + sae.b_dec
    if sae.config.normalisation == "centre_scale":
        return y / sae.input_scale + sae.input_mean
    if sae.config.normalisation == "layer_norm":
        latents = sae.encode(x)
        return y * latents.token_scale + latents.token_mean
    return y


def reference(model: Any, sae: SAE, ids: Tensor, f: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Dense latents [B, T, F], the metric's gradient for each, and the metric; `f` in the place of the run's."""
    kept: list[Tensor] = []

    def put(_module: Any, _args: Any, x: Tensor) -> Tensor:
        clean = sae.encode(x).to_dense(F)
        own = (clean if f is None else f).detach().clone().requires_grad_()
        kept.append(own)
        changed = decoded(sae, own, x) + (x - decoded(sae, clean, x)).detach()
        return torch.where((ids != 1)[..., None], changed, x)

    handle = model.model.layers[1].register_forward_hook(put)
    value = metric(model(ids))
    handle.remove()
    (gradient,) = torch.autograd.grad(value, kept[0])
    return kept[0].detach(), gradient, value.detach()


def dense(found: Attribution, values: Tensor) -> Tensor:
    return replace(found.latents, values=values).to_dense(F)


@pytest.mark.parametrize("normalisation", ["none", "centre_scale", "layer_norm"])
def test_scores_are_those_of_the_tape(normalisation: str) -> None:
    model, ids, sae = tiny_llama(), prompt(), made(normalisation)
    found = attribute(model, sae, {"input_ids": ids}, metric, HOOK, inactive=5)
    f_BTF, g_BTF, value = reference(model, sae, ids)
    acts = (ids != 1)[..., None]
    assert found.metric == pytest.approx(float(value), rel=1e-5)
    assert found.metric == float(metric(model(ids)))
    assert torch.allclose(dense(found, found.scores), f_BTF * g_BTF * acts, atol=1e-5)
    has = found.latents.indices >= 0
    assert torch.equal(has, acts.expand_as(has))
    assert not found.baseline.any()
    rest = (g_BTF * acts).masked_fill(f_BTF != 0, 0)
    best = rest.abs().topk(5).values
    assert torch.allclose(found.inactive.values.abs(), best, atol=1e-5)
    assert torch.allclose(found.inactive.to_dense(F)[rest.abs() >= best[..., -1:]],
                          rest[rest.abs() >= best[..., -1:]], atol=1e-5)  # fmt: skip
    numbers, sums = found.by_latent()
    totals = (f_BTF * g_BTF * acts).sum((0, 1))
    assert torch.allclose(sums, totals[numbers], atol=1e-5)
    assert len(numbers) == ((f_BTF != 0) & acts).any(0).any(0).sum()
    first, *_ = found.top(3)
    assert abs(first.score) == float(found.scores.abs().max())
    assert first.value == pytest.approx(float(f_BTF[first.row, first.position, first.latent]))


def test_it_takes_one_forward_and_one_backward_and_leaves_nothing_behind() -> None:
    model, ids, sae = tiny_llama().requires_grad_(True), prompt(), made("centre_scale")
    forwards: list[int] = []
    backwards: list[int] = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: forwards.append(1))
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())

    def counted(out: Any) -> Tensor:
        if out.logits.requires_grad:
            out.logits.register_hook(lambda _: backwards.append(1))
        return metric(out)

    for arguments, cost in (({}, (1, 1)), ({"baseline": {"input_ids": ids.flip(1)}}, (2, 1)), ({"points": 3}, (4, 3))):
        forwards.clear(), backwards.clear()
        attribute(model, sae, {"input_ids": ids}, counted, HOOK, inactive=3, **arguments)
        assert (len(forwards), len(backwards)) == cost
    assert all(one.grad is None for one in (*model.parameters(), *sae.parameters()))
    assert sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()) == hooks
    handle.remove()


def test_a_corrupted_run_is_the_baseline() -> None:
    model, ids, sae = tiny_llama(), prompt(), made("centre_scale")
    other = ids.clone()
    other[:, 2:5] = other[:, 2:5].flip(1) + 1
    found = attribute(model, sae, {"input_ids": ids}, metric, HOOK, baseline=(other,))
    f_BTF, g_BTF, _ = reference(model, sae, ids)
    base_BTF, _, _ = reference(model, sae, other)
    acts = (ids != 1)[..., None]
    assert torch.allclose(dense(found, found.scores), (f_BTF - base_BTF) * g_BTF * acts, atol=1e-5)
    assert torch.allclose(dense(found, found.baseline), base_BTF * acts, atol=1e-6)
    assert torch.allclose(dense(found, found.latents.values), f_BTF * acts, atol=1e-6)
    same = attribute(model, sae, {"input_ids": ids}, metric, HOOK, baseline=(ids,))
    assert not same.scores.any()
    with pytest.raises(GranaryError, match=r"the baseline has \[2, 5\] rows and tokens, the run \[2, 7\]"):
        attribute(model, sae, {"input_ids": ids}, metric, HOOK, baseline=(ids[:, :5],))


def test_a_path_of_points_adds_up() -> None:
    model, ids, sae = tiny_llama(), prompt(), made("centre_scale")
    found = attribute(model, sae, {"input_ids": ids}, metric, HOOK, points=3)
    f_BTF, _, value = reference(model, sae, ids)
    acts = (ids != 1)[..., None]
    wanted = sum(reference(model, sae, ids, f_BTF * share)[1] for share in (1 / 6, 3 / 6, 5 / 6)) / 3
    assert torch.allclose(dense(found, found.scores), f_BTF * wanted * acts, atol=1e-5)
    many = attribute(model, sae, {"input_ids": ids}, metric, HOOK, points=16)
    _, _, without = reference(model, sae, ids, torch.zeros_like(f_BTF))
    assert float(many.scores.sum()) == pytest.approx(float(value - without), rel=2e-2)
    assert many.metric == float(metric(model(ids)))


@pytest.mark.parametrize("kind", ["vision", "transcoder", "lorsa"])
def test_gradients_are_finite_differences(kind: str) -> None:
    model, inputs = (seeded(llava)(), llava_inputs()) if kind == "vision" else (tiny_llama(), {"input_ids": prompt()})
    hook, dictionary = None, sae_of(D)
    if kind == "vision":
        hook = "layers.0.resid_post"
    elif kind == "transcoder":
        sites = Sites(("layers.1.mlp_in",), ("layers.1.mlp_out",))
        config = TranscoderConfig(d_in=D, d_out=D, d_latent=F, k=4, pre_bias=False, sites=sites)
        dictionary = Transcoder(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
        dictionary.output_scale.fill_(0.5)
    elif kind == "lorsa":
        dictionary = attention_itself(model)
        assert dictionary.sites == ATTENTION
    model, inputs = model.double(), {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}

    def value(out: Any) -> Tensor:
        return out.logits[0, -1, 7] - out.logits[1, -1, 9]

    found = attribute(model, dictionary, inputs, value, hook)
    assert found.top(4)
    for one in found.top(4):
        at = (found.latents.indices[one.row, one.position] == one.latent).nonzero().item()
        step, ends = 2e-3, []
        for sign in (1, -1):
            edit = Edit([one.latent], "add", sign * step)
            with torch.no_grad():
                spliced = SplicedModel(model, dictionary, hook, edits=[edit], include_bos=True)
                spliced._acting = only(one.row, one.position)  # type: ignore[method-assign]
                ends.append(float(value(spliced(**inputs))))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(found.gradient[one.row, one.position, at]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def only(row: int, position: int) -> Any:
    def acting(activation: Tensor) -> Tensor:
        mask = torch.zeros(activation.shape[:-1], dtype=torch.bool)
        mask[row, position] = True
        return mask

    return acting


def test_what_can_not_be_attributed_to_is_one_line() -> None:
    model, ids, sae = tiny_llama(), {"input_ids": prompt()}, sae_of(D)
    for match, call in (
        ("a clt is not attributed to", lambda: attribute(model, make("clt").dictionary, ids, metric)),
        ("a molt is not attributed to", lambda: attribute(model, make("molt").dictionary, ids, metric)),
        (r"a metric is one number, .* gave \[2\]",
         lambda: attribute(model, sae, ids, lambda o: o.logits[:, 0, 0], HOOK)),
        ("a metric is one number, .* gave float", lambda: attribute(model, sae, ids, lambda o: 1.0, HOOK)),
        ("does not depend on the dictionary's place, or was detached",
         lambda: attribute(model, sae, ids, lambda o: metric(o).detach(), HOOK)),
        ("does not depend on what comes out",
         lambda: attribute(model, sae, ids, lambda o: torch.ones((), requires_grad=True) * 2, HOOK)),
        ("points=0", lambda: attribute(model, sae, ids, metric, HOOK, points=0)),
        ("inactive=-1", lambda: attribute(model, sae, ids, metric, HOOK, inactive=-1)),
    ):  # fmt: skip
        with pytest.raises(GranaryError, match=match):
            call()
