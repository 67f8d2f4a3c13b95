"""Interventions: the direct effect is the edge, and an open run is the model with a changed MLP output."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.lm.frozen import run
from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import hook_at
from shared.lm.places import locate
from stage_trace.attribution import AttributionGraph
from stage_trace.certificate import certify, spearman
from stage_trace.intervene import Change, Mode
from stage_trace.nodes import Kind, Node
from stage_trace.trace import trace
from tests.tracing import bundled_transcoder


def features(graph: AttributionGraph, layer: int = 0) -> list[Node]:
    return [node for node in graph.sources if node.kind is Kind.feature and node.layer == layer]


def test_f39_a_constrained_intervention_is_the_edge(graph: AttributionGraph) -> None:
    """Of a value that is set, not only of an ablation, and of two at once; through skips."""
    assert graph.session is not None
    made = [bundled_transcoder(layer, skip=True, threshold=0.8) for layer in range(4)]
    graph = trace(graph.session.model, made, "def f(x):\n")
    one, two = features(graph)[0], features(graph, 1)[-1]
    assert one.activation is not None
    values = {one.id: 0.0, two.id: 5.0}
    change = graph.intervene(values, Mode.constrained)
    column, other = graph.sources.index(one), graph.sources.index(two)
    assert two.activation is not None
    expected = -graph.rows_RS[:, column] + (5.0 / two.activation - 1) * graph.rows_RS[:, other]
    torch.testing.assert_close(change.change_R, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(graph.predict(values, direct=True).change_R.float(), expected, rtol=1e-4, atol=1e-5)


def test_an_open_intervention_is_the_model_with_another_mlp_output(graph: AttributionGraph) -> None:
    node, session = features(graph, 1)[0], graph.session
    assert session is not None
    latents = session.replacement.stand_ins[1].latents
    at = (latents.position_N == node.position) & (latents.latent_N == node.number)
    row = latents.value_N[at] * latents.decoder(HookPoint(1, "mlp_out"), at)[0]

    def without(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[0, node.position] -= row
        return x

    handle = hook_at(locate(session.model, HookPoint(1, "mlp_out")), without)
    with torch.no_grad():
        logits = session.model(session.tokens_T[None]).logits[0, -1]
    handle.remove()
    before = session.recording.logits_V
    logit = graph.logits[0]
    expected = (logits - logits.mean())[logit.number] - (before - before.mean())[logit.number]
    assert graph.intervene({node.id: 0.0}).of(logit.id) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_modes_hold_more_and_more(graph: AttributionGraph) -> None:
    node = features(graph)[0]
    outcomes = [graph.intervene({node.id: 0.0}, mode).change_R for mode in Mode]
    for one, other in pairwise(outcomes):
        assert not torch.allclose(one, other)
    nothing = graph.intervene({node.id: float(node.activation or 0)}, "open").change_R
    assert float(nothing.abs().max()) < 1e-4


def test_norms_alone_are_held(graph: AttributionGraph) -> None:
    """Mode norms: attention answers, and no norm's factor moves."""
    session, node = graph.session, features(graph)[0]
    assert session is not None
    held = replace(session.recording, patterns=[])
    same = run(session.model, session.parts, session.tokens_T, frozen=held)
    torch.testing.assert_close(torch.stack(same.patterns), torch.stack(session.recording.patterns))
    bigger = run(session.model, session.parts, session.tokens_T, frozen=held, change=lambda _, x, __: 2 * x)
    assert not torch.allclose(torch.stack(bigger.patterns), torch.stack(session.recording.patterns))
    assert all(torch.equal(scale, session.recording.scales[key]) for key, scale in bigger.scales.items())
    assert graph.intervene({node.id: 0.0}, "norms").of(graph.logits[0].id) != 0


def test_a_latent_that_does_not_fire_can_be_set(graph: AttributionGraph) -> None:
    fires = {(node.position, node.number) for node in features(graph)}
    latent = next(number for number in range(96) if (2, number) not in fires)
    change = graph.intervene([Change(0, 2, latent, 3.0)], "constrained")
    assert float(change.change_R.abs().max()) > 0
    with pytest.raises(GranaryError, match="no latent 96"):
        graph.intervene([Change(0, 2, 96, 3.0)])


def test_what_is_no_feature_is_refused(graph: AttributionGraph) -> None:
    with pytest.raises(GranaryError, match="is no feature"):
        graph.intervene({graph.logits[0].id: 0.0})
    with pytest.raises(GranaryError, match="choose from constrained, frozen, norms, open"):
        graph.intervene({features(graph)[0].id: 0.0}, "closed")


def test_a_certificate_compares_prediction_and_model(graph: AttributionGraph) -> None:
    certificate = certify(graph, 4, 6)
    assert len(certificate.ablations) == 4
    held = certificate.rank_correlation(Mode.frozen)
    assert held is not None
    assert -1 <= held <= 1
    first = certificate.ablations[0]
    assert first.actual[Mode.open] == graph.intervene({first.node.id: 0.0}, Mode.open).of(certificate.logit.id)
    held, free = (torch.tensor([one.actual[mode] for one in certificate.ablations]) for mode in (Mode.norms, Mode.open))
    assert certificate.ceiling() == pytest.approx(spearman(held, free))
    few = certify(graph, 2, 2)
    assert few.ceiling() is None
    assert few.rank_correlation(Mode.open) is None
    assert few.influence_correlation() is None
    assert set(certificate.to_dict()) == {"logit", "frozen", "norms", "open", "ceiling", "influence", "ablations"}


def test_influence_is_ranked_against_the_divergence_of_a_free_ablation(graph: AttributionGraph) -> None:
    """Of one feature by the formula on the model's own logits; in the order of influence, one entry each."""
    certificate, session = certify(graph, 2, 5), graph.session
    assert session is not None
    influence = [one.node.influence or 0.0 for one in certificate.divergences]
    assert len(set(influence)) == 5
    assert influence == sorted(influence, reverse=True)
    node = certificate.divergences[3].node
    latents = session.replacement.stand_ins[node.layer].latents
    at = (latents.position_N == node.position) & (latents.latent_N == node.number)
    row_D = latents.value_N[at] * latents.decoder(node.output, at)[0]

    def without(x: torch.Tensor) -> torch.Tensor:
        return x - row_D * (torch.arange(x.shape[1]) == node.position)[None, :, None]

    handle = hook_at(locate(session.model, HookPoint(node.layer, "mlp_out")), without)
    with torch.no_grad():
        after = session.model(session.tokens_T[None]).logits[0, -1].log_softmax(-1)
    handle.remove()
    before = session.recording.logits_V.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum())
    assert certificate.divergences[3].kl == pytest.approx(kl, rel=1e-2, abs=1e-6)
    expected = spearman(torch.tensor(influence), torch.tensor([one.kl for one in certificate.divergences]))
    assert certificate.influence_correlation() == pytest.approx(expected)


def test_rank_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert spearman(x, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, abs=1e-4)
    assert spearman(x, torch.ones(4)) == 0
