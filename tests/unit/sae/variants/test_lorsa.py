"""Latents that attend: against a loop over positions; gradients, documents, memory, planted heads, a model's heads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from shared.basics.errors import GranaryError
from shared.kernels.attention import tiles
from shared.lm.attention import heads_of, shape_of
from shared.sae import Lorsa, load
from shared.sae.contexts import Contexts
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.learn.start_heads import start_heads
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import Sites, SiteWidths
from tests.dense import assert_same_gradients, attended, dense_loss
from tests.families import FAMILIES
from tests.sizes import Sizes
from tests.variants import ACTIVATIONS, contexts, make

ALL = {"softcap": 3.0, "window": 3, "norm_eps": 1e-5, "rope_scale": 1.1}
CASES: list[dict[str, Any]] = [
    *({"activation": activation} for activation in ACTIVATIONS),
    {"activation": "topk", **ALL},
    {"activation": "batchtopk", "auxk_k": 2, "normalisation": "scale"},
    {"activation": "jumprelu", "penalty": "l0", "unit_norm_decoder": False, **ALL},
]


def started(dtype: torch.dtype = torch.float32, **given: Any) -> tuple[Objective, Lorsa, Contexts, Tensor]:
    objective = make("lorsa", dtype, **given)
    made = objective.dictionary
    assert isinstance(made, Lorsa)
    x, y_ND = contexts(objective)
    initialise(objective, None, x, None, y_ND)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=dtype)
            parameter.add_(0.1 * noise)
    return objective, made, x, y_ND


@pytest.mark.parametrize("given", CASES, ids=str)
def test_value_and_every_gradient(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever a tile is: all at once, a few heads, one context and one head."""
    objective, made, x, y_ND = started(torch.float64, auxk_alpha=0.5, **given)
    dead_F = torch.arange(made.config.d_latent) % 7 == 0
    expected = dense_loss(made, objective.learning, x, y_ND, dead_F)
    for scores in (1 << 24, 3 * 49, 1):
        monkeypatch.setattr(tiles, "TILE_SCORES", scores)
        losses = objective.losses(x, y_ND, StepInputs(dead=dead_F))
        assert losses.metrics["auxk"] > 0
        torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)
        assert_same_gradients(made, losses.total, expected, keep=True)


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, {"frequencies": ()}, {"window": 1}, ALL], ids=str)
def test_forward_is_a_loop(given: dict[str, Any]) -> None:
    _, made, x, _ = started(**given)
    found = made.encode(x, return_all_features=True)
    mixed_NFD = attended(made, x).repeat_interleave(made.config.latents_per_head, 1)
    z_NF = (mixed_NFD * made.W_enc).sum(2) + made.b_enc
    assert found.all_features is not None
    torch.testing.assert_close(found.all_features, torch.relu(z_NF), atol=1e-5, rtol=1e-5)
    values_NK, indices_NK = torch.relu(z_NF).topk(4)
    torch.testing.assert_close(found.values, values_NK, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.indices, indices_NK.masked_fill(values_NK == 0, -1))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_f26_lorsa_causal(activation: str) -> None:
    """What comes later changes nothing, to the bit."""
    _, made, _, _ = started(activation=activation)
    x_1TD = torch.randn(1, 10, 9)
    before = made(x_1TD).x_hat
    x_1TD[:, 6:] += 5
    after = made(x_1TD).x_hat
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize("given", [{}, ALL, {"activation": "batchtopk"}], ids=str)
def test_f26_document_isolated_and_rope_restarts(given: dict[str, Any]) -> None:
    """Documents in one context are what each is alone, at positions of its own; padding behind them is nothing."""
    _, made, _, _ = started(**given)
    first, second = torch.randn(1, 4, 9), torch.randn(1, 5, 9)
    together = torch.cat([first, second, torch.randn(1, 2, 9)], 1)
    documents_1T = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 2])
    packed = made(Contexts.of(together, documents_1T, documents_1T >= 0)).x_hat
    alone = torch.cat([made(first).x_hat[0], made(second).x_hat[0]])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    joined = made(together).x_hat[0, :9]
    torch.testing.assert_close(joined[:4], alone[:4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(joined[4:], alone[4:], atol=1e-3)


@torch.no_grad()
def test_f26_bos_is_a_key_not_a_target() -> None:
    """A position that does not count changes what others read, and has no latents and no loss of its own."""
    objective, made, x, y_ND = started()
    C, T = x.documents_CT.shape
    counts_CT = torch.ones(C, T, dtype=torch.bool)
    counts_CT[:, 0] = False
    masked = Contexts.of(x.rows_CTD, torch.zeros(C, T, dtype=torch.int64), counts_CT)
    everywhere = Contexts.whole(x.rows_CTD)
    y_SD = torch.randn(C * T, 7)
    all_SF, some_NF = (made.encode(one, return_all_features=True).all_features for one in (everywhere, masked))
    assert all_SF is not None
    assert some_NF is not None
    torch.testing.assert_close(some_NF, all_SF[counts_CT.flatten()])
    assert len(some_NF) == C * (T - 1)
    y_ND = masked.counted(y_SD.view(C, T, 7))
    error_ND = made(masked).x_hat - y_ND
    fvu = (error_ND * made.output_scale).square().sum(1).mean() / made.output_variance.sum()
    torch.testing.assert_close(objective.losses(masked, y_ND).metrics["fvu"], fvu)
    moved = x.rows_CTD.clone()
    moved[:, 0] += 3
    assert not torch.allclose(made(masked).x_hat, made(masked.with_rows(moved)).x_hat, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_f27_lorsa_gqa_init(family: str) -> None:
    """Begun from a model's heads, each twice, its patterns are the model's on raw activations, normalised or not."""
    torch.manual_seed(2)
    model = AutoModel.from_config(FAMILIES[family]()).eval()
    seen: list[Tensor] = []
    handle = model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    model.set_attn_implementation("eager")
    expected = model(torch.randint(3, 50, (3, 12)), output_attentions=True, use_cache=False).attentions[1]
    handle.remove()
    shape, heads = shape_of(model, 1), heads_of(model, 1)
    form = {name: getattr(shape.form, name) for name in shape.form.__dataclass_fields__}
    x = Contexts.whole(seen[0] + 0.0)
    for normalisation in ("centre_scale", "none"):
        given = {**form, "qk_heads": 2 * shape.heads, "qk_width": shape.width, "normalisation": normalisation}
        objective = make("lorsa", places=(Sites(("a",), ("b",)), SiteWidths((16,), (16,))), **given)
        made = objective.dictionary
        assert isinstance(made, Lorsa)
        initialise(objective, None, x, None, torch.randn(len(x), 16), heads=heads)
        found = made.patterns(x)
        for copy in (0, 1):
            torch.testing.assert_close(found[:, copy::2], expected, atol=1e-5, rtol=0)
        values_ED = heads.W_V_HED[1]
        own_LD = made.W_enc[3 * made.config.latents_per_head :]
        own_LD = own_LD / own_LD.norm(dim=1, keepdim=True)
        inside_LD = own_LD @ torch.linalg.pinv(values_ED) @ values_ED
        torch.testing.assert_close(inside_LD, own_LD, atol=1e-4, rtol=0)
    odd = make("lorsa", places=(Sites(("a",), ("b",)), SiteWidths((16,), (16,))), qk_heads=1).dictionary
    assert isinstance(odd, Lorsa)
    with pytest.raises(GranaryError, match="the model has 2 heads of 8 features, the lorsa 1 of 6: no multiple"):
        start_heads(odd, heads, 0)


def test_f28_contexts_whole() -> None:
    """A Lorsa does not take shuffled tokens, and a dictionary of tokens takes no contexts."""
    objective, made, x, y_ND = started()
    for given in (lambda rows: made.encode(rows), lambda rows: objective.losses(rows, y_ND)):
        with pytest.raises(GranaryError, match=r"reads whole contexts .* shuffled tokens have lost what came before"):
            given(x.counted(x.rows_CTD))
    other = make("transcoder")
    with pytest.raises(GranaryError, match="the transcoder reads tokens one by one, and was given whole contexts"):
        other.losses(x, y_ND)
    with pytest.raises(GranaryError, match=r"a lorsa reads one sequence at a time; its sites .* of a token"):
        replace(made.config, sites=Sites(("a",), ("b",)))
    with pytest.raises(GranaryError, match=r"a transcoder reads one token at a time; its sites .* of a sequence"):
        replace(other.dictionary.config, sites=Sites(("a",), ("b",), "sequence"))


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_no_latents_of_all_positions_and_no_patterns_are_kept(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a step is a tile's, of one head: neither [N, F] nor [H, T, T] is made."""
    T, F, H = 32, 160, 8
    given = {"activation": activation, "k": 4, "d_latent": F, "qk_heads": H, "qk_width": 2, "frequencies": (1.0,)}
    objective = make("lorsa", **given)
    made = objective.dictionary
    x_CTD, y_CTD = torch.randn(2, T, 9), torch.randn(2, T, 7)
    x = Contexts.whole(x_CTD)
    y_ND = y_CTD.flatten(0, 1)
    initialise(objective, None, x, None, y_ND)
    monkeypatch.setattr(tiles, "TILE_SCORES", T * T)
    optimiser = make_optimiser(made, AdamConfig(lr=1e-3))
    objective.losses(x, y_ND)
    with Sizes() as seen:
        objective.losses(x, y_ND, StepInputs(dead=torch.arange(F) < 5)).total.backward()
        optimiser.step()
        made(x)
    assert seen.largest < min(2 * T * F, H * T * T) / 4


@pytest.mark.slow
def test_a12_planted_heads_are_found() -> None:
    """Two heads of attention, each moving sparse features: a Lorsa that begins at random explains what they write."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    planted = make("lorsa", qk_heads=2, qk_width=4, d_latent=16, k=16, scale=0.7, normalisation="none").dictionary
    assert isinstance(planted, Lorsa)
    with torch.no_grad():
        planted.W_Q.copy_(draw(2, 4, 9))
        planted.W_K.copy_(draw(2, 4, 9))
    data = []
    for _ in range(60):
        x_CTD = draw(8, 16, 9)
        data.append((Contexts.whole(x_CTD), planted(x_CTD).x_hat.flatten(0, 1)))
    objective = make("lorsa", qk_heads=4, qk_width=4, d_latent=64, k=16, scale=0.7)
    made = objective.dictionary
    both = Contexts.whole(torch.cat([x.rows_CTD for x, _ in data[:10]]))
    initialise(objective, None, both, None, torch.cat([y_ND for _, y_ND in data[:10]]))
    optimiser = make_optimiser(made, AdamConfig(lr=1e-2))
    for step in range(400):
        x, y_ND = data[step % len(data)]
        optimiser.zero_grad()
        losses = objective.losses(x, y_ND)
        losses.total.backward()
        optimiser.step()
    x_CTD = draw(8, 16, 9)
    y_CTD = planted(x_CTD).x_hat
    error_CTD = made(x_CTD).x_hat - y_CTD
    assert float(error_CTD.square().sum() / (y_CTD - y_CTD.flatten(0, 1).mean(0)).square().sum()) < 0.1


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, made, x, _ = started(**ALL, activation="batchtopk")
    made.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert isinstance(found, Lorsa)
    assert found.config == made.config
    assert torch.equal(found(x).x_hat, made(x).x_hat)
    x_1TD = x.rows_CTD[:1]
    latents = found.encode(x_1TD)
    assert latents.values.shape[:2] == x_1TD.shape[:2]
    assert found.decode(latents).shape == (1, x_1TD.shape[1], 7)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"qk_heads": 3}, "variant.qk_heads=3: 40 latents do not divide among them"),
        ({"qk_width": 3}, "variant.frequencies are 2, of pairs of features, and a head has 3"),
        ({"scale": 0.0}, "variant.scale=0.0: must be a positive number"),
        ({"window": 0}, "variant.window=0: must be at least 1, or null"),
    ],
    ids=str,
)
def test_configs_that_make_no_sense(given: dict[str, Any], told: str) -> None:
    with pytest.raises(GranaryError, match=told):
        make("lorsa", **given)
