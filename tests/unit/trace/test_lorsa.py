"""Lorsas in the place of attention: edges in closed form, interventions, the replacement model, and what is written."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm import load_causal_lm
from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import hook_at
from shared.lm.places import locate
from shared.sae.contexts import Contexts
from stage_trace.attribution import AttributionGraph
from stage_trace.files import dumps, to_document
from stage_trace.heads import as_targets, carried
from stage_trace.intervene import Change, Mode
from stage_trace.nodes import Kind, Node
from stage_trace.spliced import splice_all
from stage_trace.sweep import sweep
from stage_trace.targets import Features, Logits, logit_targets
from stage_trace.trace import trace
from tests.tracing import (
    Traced,
    bundled_lorsa,
    bundled_transcoder,
    exact_lorsa,
    make_lorsa,
    make_model,
    make_traced,
    make_transcoder,
    of_dictionaries,
)

TEXT = "def f(x):\n"
ATTENDED = (1, 2)
"""Layers of the bundled model whose attention a Lorsa stands in for."""


@pytest.fixture(scope="module")
def lorsa_graph() -> AttributionGraph:
    made = [bundled_transcoder(layer, skip=layer == 2, threshold=0.8) for layer in range(4)]
    return trace("bundled", [*made, *map(bundled_lorsa, ATTENDED)], TEXT)


def features(graph: AttributionGraph, layer: int, site: str) -> list[Node]:
    return [one for one in graph.sources if one.kind is Kind.feature and (one.layer, one.site) == (layer, site)]


def rows_of(traced: Traced) -> tuple[Tensor, Tensor]:
    """Of all features, and of three logits."""
    logits = Logits.choose(traced.recording.logits_V, 1.0, 3)
    every = Features.of(traced.replacement)
    targets = (
        every[torch.arange(len(every))],
        logit_targets(logits, traced.parts, traced.recording, len(traced.columns.outputs)),
    )
    args = traced.parts, traced.recording, traced.replacement, traced.columns
    found = [sweep(*args, one).rows_BS for one in targets]
    return found[0], found[1]


def test_edges_of_an_exact_lorsa_in_closed_form() -> None:
    """One layer of attention, an MLP that adds nothing, and a Lorsa that is the attention.

    A latent gets A_h[t, s] s_s (w e_i) . embedding_s from token s and gives f_i through the final norm; summed over
    latents that is each token's edge to the logits where the model's own attention is held.
    """
    model = make_model("llama", torch.float64)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.model.layers[0].mlp.down_proj.weight.zero_()
    lorsa = exact_lorsa(model, 0)
    traced = of_dictionaries(model, [lorsa])
    attention, mlp = traced.replacement.stand_ins
    assert float(attention.error_TD.abs().max()) < 1e-5
    assert float(mlp.error_TD.abs().max()) == 0
    rows, logits = rows_of(traced)
    latents, columns, recording = attention.latents, traced.columns, traced.recording
    assert len(latents.value_N) == 5 * lorsa.config.d_latent // 2  # one of the two signs of every direction

    embedded_TD = recording.sites[HookPoint(0, "resid_pre")]
    norm = model.model.layers[0].input_layernorm
    encoder_ND = latents.encoder(slice(None)) * norm.weight
    heads_N = latents.latent_N // lorsa.config.latents_per_head
    pattern_NT = recording.patterns[0][heads_N, latents.position_N]  # the model's own
    scaled_TD = embedded_TD * torch.rsqrt(embedded_TD.square().mean(1, keepdim=True) + norm.variance_epsilon)
    expected = pattern_NT * (encoder_ND @ scaled_TD.T)
    torch.testing.assert_close(rows[:, columns.tokens], expected, rtol=1e-4, atol=1e-5)
    assert float(rows[:, : columns.tokens.start].abs().max()) < 1e-5  # nothing else feeds them

    chosen = Logits.choose(recording.logits_V, 1.0, 3).tokens
    final = model.model.norm
    scale = recording.scales[1, "final"][-1]
    reads_BD = (model.lm_head.weight[chosen] - model.lm_head.weight.mean(0)) * final.weight * scale
    at_end = latents.position_N == 5
    written_ND = latents.value_N[:, None] * latents.decoder(HookPoint(0, "attn_out"), slice(None))
    gives = torch.where(at_end, reads_BD @ written_ND.T, 0.0)
    torch.testing.assert_close(logits[:, : len(at_end)], gives, rtol=1e-9, atol=1e-11)

    through = (gives / latents.value_N) @ rows[:, columns.tokens]
    plain = of_dictionaries(model, [])
    _, direct = rows_of(plain)
    together = logits[:, columns.tokens] + through
    torch.testing.assert_close(together, direct[:, plain.columns.tokens], rtol=1e-4, atol=1e-5)


def test_an_edge_from_a_transcoder_to_a_lorsa_in_closed_form() -> None:
    """A[t, s] (w_v,i . source), its own pattern frozen, and nothing from a position that it does not see."""
    traced = of_dictionaries(make_model("llama"), [make_transcoder(0), make_lorsa(1, window=3)])
    first, attention = traced.replacement.stand_ins[0].latents, traced.replacement.stand_ins[1].latents
    rows, _ = rows_of(traced)
    part = traced.parts.layers[1].attention_norm
    scale_T1 = traced.recording.scales[1, "attention"]
    written_ND = first.value_N[:, None] * first.decoder(HookPoint(0, "mlp_out"), slice(None))
    read_ND = written_ND * scale_T1[first.position_N] * part.weight_D
    assert attention.patterns is not None
    lorsa = traced.dictionaries[1]
    pattern_HTT = lorsa.patterns(traced.recording.sites[HookPoint(1, "attn_in")][None])[0].double()  # type: ignore[operator]
    heads_N = attention.latent_N // attention.patterns.per_head
    pattern_NT = pattern_HTT[heads_N, attention.position_N]
    expected = pattern_NT[:, first.position_N] * (attention.encoder(slice(None)) @ read_ND.T)
    n = len(first.value_N)
    torch.testing.assert_close(rows[n : n + len(expected), :n], expected, rtol=1e-4, atol=1e-6)
    far = attention.position_N[:, None] - first.position_N >= 3
    assert float(expected[far].abs().max()) == 0
    assert float(expected[~far].abs().max()) > 1e-3


def test_f39_a_constrained_intervention_on_a_lorsa_is_the_edge(lorsa_graph: AttributionGraph) -> None:
    """With a transcoder's latent of an earlier layer at once, and one that does not fire."""
    graph = lorsa_graph
    assert graph.worst_gap < 1e-4
    one, two = features(graph, 0, "mlp_out")[0], features(graph, 1, "attn_out")[2]
    assert two.activation is not None
    values = {one.id: 0.0, two.id: 3.0}
    change = graph.intervene(values, Mode.constrained).change_R
    columns = [graph.sources.index(node) for node in (one, two)]
    expected = -graph.rows_RS[:, columns[0]] + (3.0 / two.activation - 1) * graph.rows_RS[:, columns[1]]
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    read = [row for row, node in enumerate(graph.targets) if node.site == "attn_out"]
    assert float(expected[read].abs().max()) > 1e-3
    torch.testing.assert_close(graph.predict(values, direct=True).change_R.float(), expected, rtol=1e-4, atol=1e-5)
    silent = next(n for n in range(64) if f"A1_{n}_3" not in {node.id for node in graph.sources})
    moved = graph.intervene([Change(1, 3, silent, 2.0, "attn_out")], "constrained").change_R
    assert float(moved.abs().max()) > 0
    with pytest.raises(GranaryError, match=r"no dictionary stands in for layers\.0\.attn_out"):
        graph.intervene([Change(0, 3, 0, 2.0, "attn_out")])


def without(row_D: Tensor, position: int, x: Tensor) -> Tensor:
    return x - row_D * (torch.arange(x.shape[1]) == position)[None, :, None]


@pytest.mark.parametrize("mode", ["open", "frozen"])
def test_an_intervention_is_the_model_with_another_attention_output(lorsa_graph: AttributionGraph, mode: str) -> None:
    """And what a later Lorsa then reads is by its patterns of what it is given, or held where the model's are."""
    graph, node = lorsa_graph, features(lorsa_graph, 1, "attn_out")[5]
    session = graph.session
    assert session is not None
    latents = next(one.latents for one in session.replacement.stand_ins if one.output == node.output)
    at = (latents.position_N == node.position) & (latents.latent_N == node.number)
    row_D = (latents.value_N[at] * latents.decoder(node.output, at)[0])[0] * torch.ones(128)
    row_D = latents.value_N[at] * latents.decoder(node.output, at)[0]
    outcome = graph.intervene({node.id: 0.0}, mode)
    if mode == "frozen":
        pytest.skip("compared by its readings below")
    seen: list[Tensor] = []
    attn_in = HookPoint(2, "attn_in")
    handles = [
        hook_at(locate(session.model, node.output), partial(without, row_D, node.position)),
        hook_at(locate(session.model, attn_in), lambda x: seen.append(x.clone())),
    ]
    with torch.no_grad():
        logits = session.model(session.tokens_T[None]).logits[0, -1]
    for handle in handles:
        handle.remove()
    before, logit = session.recording.logits_V, graph.logits[0]
    expected = (logits - logits.mean())[logit.number] - (before - before.mean())[logit.number]
    assert outcome.of(logit.id) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
    later, lorsa = features(graph, 2, "attn_out")[-1], bundled_lorsa(2)
    moved_F = [
        lorsa.preactivations(lorsa.read(Contexts.whole(x_1TD))[0])[later.position]
        for x_1TD in (seen[0], session.recording.sites[attn_in][None])
    ]
    expected = (moved_F[0] - moved_F[1])[later.number]
    assert outcome.of(later.id) == pytest.approx(float(expected), rel=1e-2, abs=1e-5)
