"""Which heads carry an edge: between two positions they are all of it, whatever family, and one head alone is named."""

import json
from pathlib import Path

import pytest
import torch

from stage_trace.attribution import AttributionGraph
from stage_trace.heads import as_targets, carried, split_edges
from stage_trace.nodes import Kind, Node
from stage_trace.session import Session
from stage_trace.sweep import sweep
from stage_trace.targets import Features
from tests.tracing import Traced, make_clt, make_model, make_traced, of_dictionaries


def nodes_of(session: Session) -> tuple[list[Node], list[Node]]:
    """Sources in the order of their columns, biases left out, and the features among them."""
    nodes: list[Node] = []
    for one in session.replacement.stand_ins:
        pairs = zip(one.latents.position_N.tolist(), one.latents.latent_N.tolist(), strict=True)
        where = {"layer": one.output.layer, "site": one.output.site}
        nodes += [Node(Kind.feature, position=position, number=latent, **where) for position, latent in pairs]
    features, columns = list(nodes), session.columns
    T = columns.num_positions
    nodes += [Node(Kind.error, one.layer, at, -1, site=one.site) for one in columns.outputs for at in range(T)]
    nodes += [Node(Kind.fixed, one.layer, at, -1, site=one.site) for one in columns.outputs for at in columns.fixed]
    return [*nodes, *(Node(Kind.token, -1, at, 0) for at in range(T))], features


def edges_of(session: Session, some: torch.Tensor) -> torch.Tensor:
    targets = Features.of(session.replacement)[some]
    columns = session.columns
    rows = sweep(session.parts, session.recording, session.replacement, columns, targets).rows_BS
    return torch.cat([rows[:, : columns.fixed_outputs.stop], rows[:, columns.tokens]], 1).T


@pytest.mark.parametrize("family", ["llama", "gemma2", "pythia", "clt"])
def test_heads_carry_all_of_an_edge_between_two_positions(family: str) -> None:
    traced: Traced = of_dictionaries(make_model("llama"), [make_clt(3)]) if family == "clt" else make_traced(family)
    session = traced.session
    sources, features = nodes_of(session)
    some = session.numbers(features)[::3]
    targets = as_targets(session, [features[number] for number in some.tolist()])
    found = carried(session, sources, targets)
    expected = edges_of(session, some)
    apart = torch.tensor([[s.position != p for p in targets.position_B.tolist()] for s in sources])
    torch.testing.assert_close(found.moved_SB[apart], expected[apart], rtol=1e-9, atol=1e-11)
    assert float(expected[apart].abs().max()) > 1e-3
    whole = carried(session, sources, targets, most=99)
    torch.testing.assert_close(whole.weight_SBM.sum(-1), whole.moved_SB)
    torch.testing.assert_close(found.weight_SBM, whole.weight_SBM[..., :3])


def test_one_head_is_named() -> None:
    model = make_model("llama")
    traced = make_traced("llama")
    weight = traced.parts.layers[1].heads.output.weight  # of this family's attention
    E = weight.shape[1] // len(traced.parts.layers[1].heads.W_O_HDE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj.weight.data[:, E : 2 * E] = weight[:, E : 2 * E]
    session = of_dictionaries(model, traced.dictionaries).session
    sources, features = nodes_of(session)
    some = [node for node in features if node.layer == 1]
    found = carried(session, sources, as_targets(session, some))
    H = len(session.parts.layers[1].heads.W_O_HDE)
    assert set(found.head_SBM[found.weight_SBM != 0].tolist()) == {H + 1}


def test_links_name_their_heads(graph: AttributionGraph, tmp_path: Path) -> None:
    pruned = graph.prune()
    split = split_edges(pruned)
    document = json.loads(pruned.save(tmp_path)[0].read_text())
    held = {(one["source"], one["target"]): one.get("granary_heads") for one in document["links"]}
    assert split
    for key, heads in split.items():
        assert held[key] == [list(one) for one in heads]
        assert 1 <= len(heads) <= 3
        assert abs(heads[0][2]) == max(abs(weight) for _, _, weight in heads)
