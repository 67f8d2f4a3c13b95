"""Lorsas in the place of attention: edges in closed form, interventions, the replacement model, and what is written."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm import load_causal_lm, load_tokenizer
from shared.lm.frozen import run
from shared.lm.hookpoint import HookPoint
from shared.lm.hooks import hook_at
from shared.lm.places import locate
from shared.sae import Dictionary, Lorsa
from shared.sae.contexts import Contexts
from stage_trace.attribution import AttributionGraph
from stage_trace.files import dumps, to_document, with_marks
from stage_trace.heads import as_targets, carried
from stage_trace.intervene import Change, Mode
from stage_trace.nodes import Kind, Node, uncantor
from stage_trace.spliced import splice_all
from stage_trace.sweep import sweep
from stage_trace.targets import Features, Logits, Targets, logit_targets
from stage_trace.trace import TraceSettings, of_session, trace
from tests.tracing import (
    Traced,
    bundled_lorsa,
    bundled_transcoder,
    exact_lorsa,
    make_lorsa,
    make_model,
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
    rows = sweep(*args, Targets.joined(targets)).rows_BS
    return rows[:-3], rows[-3:]


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


def row_of(graph: AttributionGraph, node: Node) -> Tensor:
    """What a feature adds to its output, [D]."""
    assert graph.session is not None
    latents = next(one.latents for one in graph.session.replacement.stand_ins if one.output == node.output)
    at = (latents.position_N == node.position) & (latents.latent_N == node.number)
    return latents.value_N[at] * latents.decoder(node.output, at)[0]


def without(row_D: Tensor, position: int, x: Tensor) -> Tensor:
    return x - row_D * (torch.arange(x.shape[-2]) == position)[:, None]


def test_an_open_intervention_is_the_model_with_another_attention_output(lorsa_graph: AttributionGraph) -> None:
    """What a later Lorsa then reads is by its patterns of what it is given."""
    graph, node, later = lorsa_graph, features(lorsa_graph, 1, "attn_out")[5], features(lorsa_graph, 2, "attn_out")[-1]
    session = graph.session
    assert session is not None
    seen: list[Tensor] = []
    attn_in = HookPoint(2, "attn_in")
    handles = [
        hook_at(locate(session.model, node.output), partial(without, row_of(graph, node), node.position)),
        hook_at(locate(session.model, attn_in), lambda x: seen.append(x.clone())),
    ]
    with torch.no_grad():
        logits = session.model(session.tokens_T[None]).logits[0, -1]
    for handle in handles:
        handle.remove()
    before, logit = session.recording.logits_V, graph.logits[0]
    expected = (logits - logits.mean())[logit.number] - (before - before.mean())[logit.number]
    outcome, lorsa = graph.intervene({node.id: 0.0}), bundled_lorsa(2)
    assert outcome.of(logit.id) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)
    after_F, before_F = (
        lorsa.preactivations(lorsa.read(Contexts.whole(x_1TD))[0])[later.position]
        for x_1TD in (seen[0], session.recording.sites[attn_in][None])
    )
    assert outcome.of(later.id) == pytest.approx(float((after_F - before_F)[later.number]), rel=1e-2, abs=1e-5)


def test_where_patterns_are_held_those_of_lorsas_are_too(lorsa_graph: AttributionGraph) -> None:
    graph, node, later = lorsa_graph, features(lorsa_graph, 1, "attn_out")[5], features(lorsa_graph, 2, "attn_out")[-1]
    session, row_D = graph.session, row_of(graph, node)
    assert session is not None

    def change(output: HookPoint, added_TD: Tensor, _: object) -> Tensor:
        return without(row_D, node.position, added_TD) if output == node.output else added_TD

    attn_in = HookPoint(2, "attn_in")
    args = session.model, session.parts, session.tokens_T, [attn_in, node.output]
    with torch.no_grad():
        after = run(*args, frozen=session.recording, change=change)
    outcome, logit, lorsa = graph.intervene({node.id: 0.0}, Mode.frozen), graph.logits[0], bundled_lorsa(2)
    expected = session.parts.logit_vectors(torch.tensor([logit.number]), torch.float32) @ (
        after.final_TD[-1] - session.recording.final_TD[-1]
    )
    assert outcome.of(logit.id) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    clean_TD = session.recording.sites[attn_in]
    pattern_T = lorsa.patterns(clean_TD[None])[0, later.number // lorsa.config.latents_per_head, later.position]
    encoder_D = lorsa.W_enc[later.number] * lorsa.input_scale
    moved = float(encoder_D @ (pattern_T @ (after.sites[attn_in] - clean_TD)))
    assert abs(moved) > 1e-4
    assert outcome.of(later.id) == pytest.approx(moved, rel=1e-3)
    # Two latents of which the second has changed by the first: it is encoded again by those patterns, then set.
    both = graph.intervene({node.id: 0.0, later.id: 0.0}, Mode.frozen)
    assert both.of(logit.id) != outcome.of(logit.id)


def test_the_replacement_model_has_lorsas_in_the_place_of_attention() -> None:
    """All of its dictionaries at once, each encoding what those before it have made; BOS keeps what the model adds."""
    model, made = load_causal_lm("bundled"), [bundled_transcoder(0, threshold=0.8), *map(bundled_lorsa, (0, 2))]
    graph = trace(model, made, TEXT)
    assert graph.session is not None
    found, tokens_1T = splice_all(graph.session), graph.session.tokens_T[None]
    with torch.no_grad():
        clean = model(tokens_1T).logits[0].log_softmax(-1)[1:]
    handles, read = [], {}

    def keep(name: str, x: Tensor) -> None:
        read[name] = x

    def put(dictionary: Dictionary, name: str, x: Tensor) -> Tensor:
        replaced = dictionary(read[name]).x_hat
        return torch.cat([x[:, :1], replaced[:, 1:]], 1)

    for one in made:
        assert one.sites is not None
        (reads,), (writes,) = one.sites.reads, one.sites.writes
        handles.append(hook_at(locate(model, HookPoint.parse(reads)), partial(keep, reads)))
        handles.append(hook_at(locate(model, HookPoint.parse(writes)), partial(put, one, reads)))
    with torch.no_grad():
        after = model(tokens_1T).logits[0].log_softmax(-1)[1:]
    for handle in handles:
        handle.remove()
    kl_N = (clean.exp() * (clean - after)).sum(-1)
    assert found.kl == pytest.approx(float(kl_N.mean()), rel=1e-3)
    assert found.kl > 0.01
    assert found.kl_last == pytest.approx(float(kl_N[-1]), rel=1e-3)
    assert found.agreeing == int((clean.argmax(-1) == after.argmax(-1)).sum())


def test_f40_nodes_of_a_lorsa_have_types_ids_and_names_of_their_own(
    lorsa_graph: AttributionGraph, tmp_path: Path
) -> None:
    pruned = lorsa_graph.prune(0.95, 0.99)
    document = json.loads(dumps(to_document(pruned, "graph")))
    nodes = {node["node_id"]: node for node in document["nodes"]}
    assert len(nodes) == len(document["nodes"])
    attention = [node for node in nodes.values() if node["feature_type"] == "lorsa"]
    assert attention
    for node in attention:
        layer, latent = uncantor(node["feature"])  # attention counts as layers behind the model's four
        assert node["node_id"] == f"A{layer - 4}_{latent}_{node['ctx_idx']}"
        assert node["layer"] == str(layer - 4)
        assert node["clerp"] == f"layer {layer - 4}, attention latent {latent}"
        assert node["granary_kind"] == "feature"
    errors = [node["clerp"] for node in nodes.values() if node["feature_type"] == "lorsa error"]
    assert any(said.startswith("error of attention, layer") for said in errors)
    features_of = [(node["feature"], node["ctx_idx"]) for node in nodes.values() if node["activation"] is not None]
    assert len(set(features_of)) == len(features_of)

    path, *_, page = pruned.save(tmp_path)
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    group = ["heads", attention[0]["node_id"], attention[1]["node_id"]]
    document["qParams"]["supernodes"] = [group]
    path.write_text(json.dumps(document))
    assert with_marks(pruned, path).supernodes == (tuple(group),)  # what a reader has saved is kept
    shown = {node["id"]: node for node in data["nodes"]}
    assert all(shown[node["node_id"]]["site"] == "attn_out" for node in attention)
    assert all(shown[node["node_id"]]["promotes"] for node in attention)
    lorsa, first = bundled_lorsa(1), next(node for node in attention if node["layer"] == "1")
    assert lorsa_graph.session is not None
    read_TD = lorsa_graph.session.recording.sites[HookPoint(1, "attn_in")]
    head = uncantor(first["feature"])[1] // lorsa.config.latents_per_head
    pattern_T = lorsa.patterns(read_TD[None])[0, head, first["ctx_idx"]]
    attends = dict(shown[first["node_id"]]["attends"])
    assert list(attends.values()) == sorted(attends.values(), reverse=True)
    assert all(share == pytest.approx(float(pattern_T[at]), abs=1e-3) for at, share in attends.items())
    assert sum(attends.values()) == pytest.approx(1, abs=0.06)
    chosen = [attention[0]["node_id"]]
    assert lorsa_graph.subgraph_scores(chosen).replacement < lorsa_graph.scores["strict"].replacement


def test_fewer_features_fold_into_the_errors_of_their_output(lorsa_graph: AttributionGraph) -> None:
    """What attention's latents without a node give is counted with its error, not with the MLP's."""
    assert lorsa_graph.session is not None
    few = of_session(
        lorsa_graph.session, lorsa_graph.prompt, load_tokenizer("bundled"), TraceSettings(max_features=12), ("it",)
    )
    assert few.columns.num_features == 12
    assert few.worst_gap < 1e-4
    last, kept = len(few.logits), {node.id for node in few.sources if node.kind is Kind.feature}

    def given(graph: AttributionGraph, site: str) -> Tensor:
        chosen = [
            node.site == site and (node.kind is Kind.error or (node.kind is Kind.feature and node.id not in kept))
            for node in graph.sources
        ]
        return graph.rows_RS[-last:][:, torch.tensor(chosen)].sum(1)

    for site in ("attn_out", "mlp_out"):
        torch.testing.assert_close(given(few, site), given(lorsa_graph, site), rtol=1e-4, atol=1e-4)


def test_heads_of_layers_that_keep_their_attention_carry_the_rest() -> None:
    """Between two positions all of an edge to a transcoder's latent; through a Lorsa there is none."""
    traced = of_dictionaries(make_model("llama"), [*map(make_transcoder, range(3)), make_lorsa(1)])
    session, columns = traced.session, traced.columns
    nodes = [
        Node(Kind.feature, one.output.layer, position, latent, site=one.output.site)
        for one in session.replacement.stand_ins
        for position, latent in zip(one.latents.position_N.tolist(), one.latents.latent_N.tolist(), strict=True)
    ]
    targets = as_targets(session, nodes)
    found = carried(session, nodes, targets)
    args = traced.parts, traced.recording, traced.replacement, columns
    expected = sweep(*args, targets).rows_BS[:, : len(nodes)].T
    is_lorsa = torch.tensor([node.is_attention for node in nodes])
    apart = torch.tensor([[source.position != target.position for target in nodes] for source in nodes])
    torch.testing.assert_close(found.moved_SB[apart & ~is_lorsa], expected[apart & ~is_lorsa], rtol=1e-9, atol=1e-11)
    heads = {number // 2 for number in found.head_SBM[found.weight_SBM != 0].tolist()}
    assert heads == {2}  # layer 1 has none, and before layer 0 nothing has been written


def test_two_lorsas_of_one_layer_and_other_places_are_refused(lorsa_graph: AttributionGraph) -> None:
    assert lorsa_graph.session is not None
    model = lorsa_graph.session.model
    with pytest.raises(GranaryError, match=r"both write layers\.1\.attn_out"):
        trace(model, [bundled_lorsa(1), bundled_lorsa(1)], TEXT)
    with pytest.raises(GranaryError, match="the model has 4 layers"):
        trace(model, [bundled_lorsa(4)], TEXT)
    other = bundled_lorsa(1)
    sites = replace(other.config.sites, reads=("layers.1.resid_pre",))  # type: ignore[type-var]
    with pytest.raises(GranaryError, match="for attention a lorsa, such as"):
        trace(model, [Lorsa(replace(other.config, sites=sites))], TEXT)
