"""What a graph is made of, on the bundled model; the closed forms are in test_closed_forms."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae import Dictionary
from stage_trace.attribution import AttributionGraph
from stage_trace.files import dumps, to_document
from stage_trace.nodes import Kind, Node, cantor, check_unique, uncantor
from stage_trace.trace import TraceSettings, trace
from tests.tracing import bundled_transcoder, make_clt


def test_f34_f35_nodes_and_edges_are_rows_and_columns(graph: AttributionGraph) -> None:
    assert len(graph.sources) == graph.columns.total == graph.rows_RS.shape[1]
    assert len(graph.targets) == len(graph.rows_RS)
    assert graph.worst_gap < 1e-4
    edges = {(edge.target.id, edge.source.id): edge.weight for edge in graph.edges}
    row, column = torch.nonzero(graph.rows_RS)[7].tolist()
    assert edges[graph.targets[row].id, graph.sources[column].id] == float(graph.rows_RS[row, column])
    last = graph.logits[0]
    total = sum(weight for (target, _), weight in edges.items() if target == last.id)
    session = graph.session
    assert session is not None
    W_U = session.parts.W_U_VD
    expected = (W_U[last.number] - W_U.mean(0)) @ session.recording.final_TD[-1]  # less the mean of all logits
    assert total == pytest.approx(float(expected), rel=1e-4)


def test_f35_probabilities_are_those_of_the_full_softmax(graph: AttributionGraph) -> None:
    session = graph.session
    assert session is not None
    probabilities = torch.softmax(session.recording.logits_V, -1)
    for node in graph.logits:
        assert node.probability == pytest.approx(float(probabilities[node.number]))
    assert [node.is_first for node in graph.logits] == [True] + [False] * (len(graph.logits) - 1)


def test_f30_ids_are_unique_where_a_latent_of_layer_0_is_numbered_like_a_layer() -> None:
    """An error called 0_{layer}_{position} would be the feature of that latent."""
    nodes = [Node(Kind.feature, 0, 5, number) for number in range(4)] + [Node(Kind.error, n, 5, -1) for n in range(4)]
    nodes += [Node(Kind.fixed, n, 5, -1) for n in range(4)] + [Node(Kind.bias, n, 0, -1) for n in range(5)]
    check_unique([*nodes, Node(Kind.token, -1, 5, 3), Node(Kind.logit, 5, 5, 3)])
    with pytest.raises(ValueError, match="two nodes are called 0_1_5"):
        check_unique([*nodes, Node(Kind.feature, 0, 5, 1)])


def test_f40_feature_numbers_round_trip() -> None:
    for layer, latent in ((0, 0), (3, 1), (0, 131_071), (61, 16_777_215)):
        assert uncantor(cantor(layer, latent)) == (layer, latent)


def test_fewer_features_fold_into_errors(graph: AttributionGraph) -> None:
    made = [bundled_transcoder(layer) for layer in range(4)]
    few = trace("bundled", made, list(graph.prompt.ids), settings=TraceSettings(max_features=9, batch=2))
    assert few.columns.num_features == 9
    assert few.worst_gap < 1e-4
    sums = few.rows_RS[-len(few.logits) :].sum(1)
    torch.testing.assert_close(sums, graph.rows_RS[-len(graph.logits) :].sum(1), rtol=1e-4, atol=1e-4)
    kept = {node.id for node in few.sources if node.kind is Kind.feature}
    first = graph.rows_RS[len(graph.targets) - len(graph.logits)].abs()
    strongest = max(
        (n for n in graph.sources if n.kind is Kind.feature), key=lambda n: float(first[graph.sources.index(n)])
    )
    assert strongest.id in kept


def test_a_pruned_graph_keeps_its_rows(graph: AttributionGraph) -> None:
    pruned = graph.prune(0.6, 0.9)
    assert len(pruned.nodes) < len(graph.nodes)
    assert len(pruned.edges) < len(graph.edges)
    assert pruned.scores == graph.scores
    with pytest.raises(GranaryError, match="a share of the influence"):
        graph.prune(1.2)


def test_scores_of_a_chosen_part(graph: AttributionGraph) -> None:
    features = [node.id for node in graph.sources if node.kind is Kind.feature]
    whole, none = graph.subgraph_scores(features), graph.subgraph_scores([])
    assert whole == graph.scores["strict"]
    assert none.replacement < whole.replacement
    with pytest.raises(GranaryError, match="no node"):
        graph.subgraph_scores(["9_9_9"])


def test_f41_the_files_are_the_same_twice(graph: AttributionGraph, tmp_path: Path) -> None:
    """No time, no hash() of a text."""
    pruned = graph.prune()
    first = {path.name: path.read_bytes() for path in pruned.save(tmp_path / "a")}
    again = trace("bundled", [bundled_transcoder(layer) for layer in range(4)], graph.prompt.text).prune()
    second = {path.name: path.read_bytes() for path in again.save(tmp_path / "b")}
    assert first == second
    assert set(first) == {"graph.json", "graph-metadata.json", "graph.html"}


def test_f40_the_json_is_the_fields_schema(graph: AttributionGraph) -> None:
    marked = replace(graph.prune(), pinned=("0_1_2",), supernodes=(("both", "0_1_2", "0_1_3"),))
    document = json.loads(dumps(to_document(marked, "graph")))
    assert document["metadata"]["prompt_tokens"][0] == "<s>"
    assert document["metadata"]["schema_version"] == 1
    assert document["qParams"]["pinnedIds"] == ["0_1_2"]
    assert document["qParams"]["supernodes"] == [["both", "0_1_2", "0_1_3"]]
    nodes = {node["node_id"]: node for node in document["nodes"]}
    assert len(nodes) == len(document["nodes"])
    assert all(link["source"] in nodes and link["target"] in nodes for link in document["links"])
    token = next(node for node in nodes.values() if node["feature_type"] == "embedding")
    assert (token["layer"], token["node_id"]) == ("E", "E_0_0")
    feature = next(node for node in nodes.values() if node["feature_type"] == "cross layer transcoder")
    layer, latent = uncantor(feature["feature"])
    assert feature["node_id"] == f"{layer}_{latent}_{feature['ctx_idx']}"
    targets = [node for node in nodes.values() if node["is_target_logit"]]
    assert len(targets) == 1
    assert targets[0]["layer"] == "5"


def test_dictionaries_that_do_not_fit_are_refused(graph: AttributionGraph) -> None:
    assert graph.session is not None
    first, model = bundled_transcoder(0), graph.session.model
    with pytest.raises(GranaryError, match="both write layers"):
        trace(model, [first, first], "x")
    with pytest.raises(GranaryError, match="the model has 4 layers"):
        trace(model, [bundled_transcoder(4)], "x")
    with pytest.raises(GranaryError, match="at least one transcoder"):
        trace(model, [], "x")


def test_f33_where_nothing_fires_all_is_error_and_the_graph_is_saved(tmp_path: Path) -> None:
    """Not at the last position either: nothing is missing a row, and scores are those of tokens and errors alone."""
    bare = trace("bundled", [bundled_transcoder(layer, threshold=1e9) for layer in range(4)], "def f(x):")
    assert bare.columns.num_features == 0
    assert bare.worst_gap < 1e-4
    for scores in bare.scores.values():
        assert 0 < scores.replacement < 1
        assert 0 < scores.completeness < 1
    document = json.loads(bare.prune().save(tmp_path, certificate=bare.certify(3, 5))[0].read_text())
    assert {node["feature_type"] for node in document["nodes"]} == {"mlp reconstruction error", "embedding", "logit"}


@pytest.mark.parametrize("kind", ["set", "clt"])
def test_f33_where_nothing_fires_at_the_last_position_alone(kind: str) -> None:
    """Rows add up, errors stand there for all of each MLP, and the replacement model runs."""
    made: list[Dictionary] = [bundled_transcoder(layer, threshold=0.8) for layer in range(4)]
    if kind == "clt":
        made = [make_clt(4, width=128, latents=48)]
    full = trace("bundled", made, "def f(x):")
    last = len(full.prompt.ids) - 1
    groups = [group for one in made for group in one.groups]
    for layer, group in enumerate(groups):
        there = [node.activation for node in full.sources if (node.layer, node.position) == (layer, last)]
        most = max((value for value in there if value is not None), default=0.0)
        group.activation.threshold.fill_(max(most + 1e-3, float(group.activation.threshold)))  # type: ignore[operator]
    graph = trace("bundled", made, "def f(x):")
    fired = {node.position for node in graph.sources if node.kind is Kind.feature}
    assert fired
    assert last not in fired
    assert graph.worst_gap < 1e-4
    assert graph.spliced().positions == last
    assert len(graph.prune().edges) > 0
