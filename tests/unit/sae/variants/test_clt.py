"""The cross-layer transcoder: what may depend on what, the row layout, choice over all layers, one layer alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import CLT, load
from shared.sae.learn.batch_facts import alone
from shared.sae.learn.dead import DeadLatents
from shared.sae.learn.init import initialise
from shared.sae.learn.inputs import StepInputs
from shared.sae.learn.objective import Objective
from shared.sae.optim import AdamConfig, make_optimiser
from shared.sae.sites import Sites, SiteWidths
from tests.variants import batch, make

LAYERS, PER_LAYER = 3, 20
CLAIMED: list[dict[str, Any]] = [
    {"activation": "topk", "k_scope": "layer"},
    {"activation": "batchtopk"},
    {"activation": "batchtopk", "k_scope": "layer"},
    {"activation": "relu"},
    {"activation": "jumprelu"},
]


def started(**given: Any) -> tuple[Objective, CLT, Tensor, Tensor]:
    objective = make("clt", **given)
    x_ND, y_ND = batch(objective, 200)
    initialise(objective, None, x_ND, None, y_ND)
    made = objective.dictionary
    assert isinstance(made, CLT)
    return objective, made, x_ND, y_ND


@pytest.mark.parametrize("given", CLAIMED, ids=str)
def test_f16_nothing_is_written_before_it_is_read(given: dict[str, Any]) -> None:
    """y^_t does not change with what later layers read, in training as at inference."""
    _, made, x_ND, _ = started(**given)
    whole_ND = made(x_ND).x_hat
    reads = [slice(0, 9), slice(9, 15), slice(15, 20)]
    writes = [slice(0, 7), slice(7, 11), slice(11, 19)]
    for changed in range(LAYERS):
        other_ND = x_ND.clone()
        other_ND[:, reads[changed]] += 1
        there_ND = made(other_ND).x_hat
        for layer in range(LAYERS):
            same = torch.equal(there_ND[:, writes[layer]], whole_ND[:, writes[layer]])
            assert same == (layer < changed), (changed, layer)


def test_f16_no_gradient_backward_in_depth() -> None:
    """Loss at the first written site alone: the later layers' encoders and decoders get none."""
    objective, made, x_ND, y_ND = started(k_scope="layer", auxk_alpha=0.0)
    with torch.no_grad():
        made.output_variance[7:] = 1e30
    objective.losses(x_ND, y_ND).total.backward()
    for number, layer in enumerate(made.groups):
        for parameter in (layer.W_enc, layer.W_dec):
            assert parameter.grad is not None
            assert (float(parameter.grad.norm()) > 1e-12) == (number == 0)
    first = made.groups[0].W_dec.grad
    assert first is not None
    assert float(first[:, 7:].norm()) < 1e-12 < float(first[:, :7].norm())


def test_f17_f19_a_row_is_the_concatenation_over_its_targets() -> None:
    """W_dec of layer l is [F, sum of the widths from l on]; y^_t sums the layers up to and with t, and nothing else."""
    _, made, x_ND, _ = started(k_scope="layer")
    assert [tuple(layer.W_dec.shape) for layer in made.groups] == [(20, 19), (20, 12), (20, 8)]
    norms = torch.cat([layer.W_dec.norm(dim=1) for layer in made.groups])
    torch.testing.assert_close(norms, torch.ones(60))
    f_NF = made.encode(x_ND).to_dense(60).split(PER_LAYER, dim=1)
    W = [layer.W_dec for layer in made.groups]
    expected = torch.cat(
        [
            f_NF[0] @ W[0][:, :7],
            f_NF[0] @ W[0][:, 7:11] + f_NF[1] @ W[1][:, :4],
            f_NF[0] @ W[0][:, 11:] + f_NF[1] @ W[1][:, 4:] + f_NF[2] @ W[2],
        ],
        1,
    )
    y_ND = made.denormalise(expected + made.b_dec).detach()
    torch.testing.assert_close(made.decode(made.encode(x_ND)), y_ND, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(x_ND.view(4, 50, -1)).x_hat.view(200, -1), y_ND, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [*CLAIMED, {"activation": "topk"}], ids=str)
def test_f10_row_alone_equals_in_batch(given: dict[str, Any]) -> None:
    _, made, x_ND, _ = started(**given)
    whole = made(x_ND).x_hat
    for row in (0, 17):
        torch.testing.assert_close(made(x_ND[row : row + 1]).x_hat[0], whole[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_k_counts_over_all_layers_or_in_each(activation: str) -> None:
    for scope, wanted in (("all", 4.0), ("layer", 12.0)):
        objective, made, x_ND, y_ND = started(activation=activation, k_scope=scope)
        assert float(objective.losses(x_ND, y_ND).metrics["l0"]) == pytest.approx(wanted, abs=0.05)
        found = made.encode(x_ND)
        assert float((found.indices >= 0).sum(1).float().mean()) == pytest.approx(wanted, rel=0.1)
        per_layer = [int((found.indices // PER_LAYER == layer).sum()) for layer in range(LAYERS)]
        assert min(per_layer) > 0
        if scope == "layer" and activation == "topk":
            assert min(per_layer) >= 0.98 * max(per_layer)  # a token may have fewer that are positive


def test_f20_choice_over_all_layers_does_not_depend_on_the_cut() -> None:
    """Micro-batches of any size keep the pairs that the whole batch keeps, and give its gradient."""
    found = []
    for parts in (1, 4):
        objective, made, x_ND, y_ND = started(activation="batchtopk")
        facts = objective.facts(x_ND.tensor_split(parts), 200)
        leasts = {float(group.least) for one in facts for group in one.groups if group.least is not None}
        assert len(leasts) == 1
        kept = 0.0
        for x, y, one in zip(x_ND.tensor_split(parts), y_ND.tensor_split(parts), facts, strict=True):
            losses = objective.losses(x, y, StepInputs(facts=one))
            (losses.total * len(x) / 200).backward()
            kept += float(losses.metrics["l0"]) * len(x)
        gradient = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
        found.append((leasts, round(kept), gradient))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-6)
    assert found[0][1] == 200 * 4
    objective.rule.after_step(objective.facts([x_ND], 200)[0])
    assert len({float(layer.activation.get_buffer("threshold")) for layer in made.groups}) == 1
    assert alone(x_ND) is None


def test_f22_the_clip_norm_is_over_all_groups() -> None:
    objective, made, x_ND, y_ND = started()
    objective.losses(x_ND, y_ND).total.backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]
    optimiser = make_optimiser(made, AdamConfig(lr=1e-2, clip_norm=1e-3))
    norm = optimiser.step()
    assert float(norm) == pytest.approx(float(torch.cat([one.flatten() for one in gradients]).norm()), rel=1e-5)
    assert len(gradients) == 3 * LAYERS + 1


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_of_one_layer_it_is_the_transcoder_bit_for_bit(activation: str) -> None:
    """Started from data and trained for some steps with dead latents.

    Without clipping: its norm is a sum over the parameters, which the two have in another order.
    """
    sides = (Sites(("a",), ("b",)), SiteWidths((9,), (7,)))
    given: dict[str, Any] = {
        "places": sides, "d_latent": 90, "k": 3, "auxk_alpha": 0.5, "activation": activation, "dead_after_tokens": 40,
    }  # fmt: skip
    for scope in ("all", "layer"):
        pair = (make("transcoder", **given), make("clt", k_scope=scope, **given))
        for objective in pair:
            made = objective.dictionary
            x_ND, y_ND = batch(objective, 200)
            initialise(objective, None, x_ND, None, y_ND)
            optimiser, dead = make_optimiser(made, AdamConfig(lr=1e-2, clip_norm=None)), DeadLatents(90, 40)
            for number in range(10):
                x_ND, y_ND = batch(objective, 20, seed=number)
                losses = objective.losses(x_ND, y_ND, StepInputs(dead=dead.mask()))
                losses.total.backward()
                optimiser.step()
                dead.update(losses.fired, 20)
            assert dead.mask().any()
        states = [objective.dictionary.state_dict() for objective in pair]
        for name, tensor in states[0].items():
            other = states[1][name if name in states[1] else f"layers.0.{name}"]
            assert torch.equal(tensor, other), (scope, name)


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, made, x_ND, _ = started(activation="batchtopk")
    made.save_pretrained(tmp_path / "clt")
    loaded = load(tmp_path / "clt")
    assert isinstance(loaded, CLT)
    assert loaded.config == made.config
    assert torch.equal(loaded(x_ND).x_hat, made(x_ND).x_hat)
    features = loaded.encode(x_ND, return_all_features=True).all_features
    assert features is not None
    assert features.shape == (200, 60)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k_scope": "layers"}, r"variant\.k_scope='layers': choose from all, layer"),
        ({"activation": "gated"}, r"sae\.activation=gated of a clt: choose from topk, batchtopk, relu, jumprelu"),
        ({"d_latent": 50}, "50 latents do not divide among the 3 layers"),
        ({"k": 21, "k_scope": "layer"}, "more than the 20 latents of a layer"),
        ({"prefixes": (10, 60)}, r"sae\.prefixes is for dictionaries of one group"),
        (
            {"places": (Sites(("a", "b"), ("c",)), SiteWidths((4, 4), (4,)))},
            "reads one site per layer and writes as many",
        ),
    ],
)
def test_wrong_words_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GranaryError, match=message):
        make("clt", **given)
