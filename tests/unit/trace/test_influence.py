"""Influence, scores and pruning against the slow dense definitions, written out for square matrices."""

import pytest
import torch
from torch import Tensor

from stage_trace.influence import Wiring, cumulative, influence, prune, scores, threshold

LAYERS, EACH, ERRORS, TOKENS, LOGITS = 3, 4, 6, 3, 2
FEATURES = LAYERS * EACH
COLUMNS = FEATURES + ERRORS + TOKENS


def make(seed: int = 0) -> tuple[Tensor, Wiring]:
    """Random rows in which a layer reads earlier layers, errors and tokens only; some rows and columns are zero."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.arange(FEATURES) // EACH
    rows = torch.randn(FEATURES + LOGITS, COLUMNS, generator=generator, dtype=torch.float64)
    rows[:FEATURES, :FEATURES] *= layer[:, None] > layer[None, :]
    rows[1] = 0
    rows[:, 6] = 0
    may_drop = torch.ones(COLUMNS, dtype=torch.bool)
    may_drop[-TOKENS:] = False
    wires = Wiring(
        torch.cat([layer, torch.full((LOGITS,), LAYERS)]),
        torch.cat([torch.arange(FEATURES), torch.full((LOGITS,), -1)]),
        torch.cat([torch.zeros(FEATURES), torch.tensor([0.7, 0.2])]).double(),
        may_drop,
    )
    return rows, wires


def square(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All nodes by all nodes, and the weight of each."""
    whole = rows.new_zeros(COLUMNS + LOGITS, COLUMNS + LOGITS)
    whole[:FEATURES, :COLUMNS], whole[COLUMNS:, :COLUMNS] = rows[:FEATURES], rows[FEATURES:]
    weight = whole.new_zeros(len(whole))
    weight[COLUMNS:] = torch.tensor([0.7, 0.2])
    return whole, weight


def dense_influence(whole: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By powers, and the shares they are powers of."""
    share = whole.abs() / whole.abs().sum(1, keepdim=True).clamp_min(1e-10)
    found, now = torch.zeros_like(weight), weight
    for _ in range(LAYERS + 2):
        now = now @ share
        found = found + now
    return found, share


def test_one_pass_is_the_whole_series() -> None:
    """Rows are targets, and rows of zeros end a path."""
    rows, wires = make()
    expected, _ = dense_influence(*square(rows))
    found = influence(rows, wires)
    torch.testing.assert_close(found, expected[:COLUMNS])
    assert not torch.allclose(found[:FEATURES], influence(rows.flip(1), wires)[:FEATURES])


def test_scores_are_the_definitions() -> None:
    rows, wires = make()
    whole, weight = square(rows)
    found, share = dense_influence(whole, weight)
    errors = torch.zeros(COLUMNS, dtype=torch.bool)
    errors[FEATURES : FEATURES + ERRORS] = True
    through = found + weight
    lost = share[:, :COLUMNS][:, errors].sum(1)
    ours = scores(rows, wires, errors)
    tokens, wrong = found[COLUMNS - TOKENS : COLUMNS].sum(), found[:COLUMNS][errors].sum()
    assert ours.replacement == pytest.approx(float(tokens / (tokens + wrong)))
    assert ours.completeness == pytest.approx(float((through * (1 - lost)).sum() / through.sum()))


def test_dropped_columns_are_as_if_they_were_not_there() -> None:
    rows, wires = make()
    errors, dropped = torch.zeros(2, COLUMNS, dtype=torch.bool)
    errors[FEATURES : FEATURES + 3] = True
    dropped[FEATURES + 3 : FEATURES + ERRORS] = True
    without = rows.clone()
    without[:, dropped] = 0
    assert scores(rows, wires, errors, dropped) == scores(without, wires, errors)
    assert scores(rows, wires, errors, dropped) != scores(rows, wires, errors)


@pytest.mark.parametrize("node_share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("edge_share", [0.0, 0.5, 0.98, 1.0])
def test_f37_pruning_keeps_what_the_definition_keeps(node_share: float, edge_share: float) -> None:
    """At both ends too."""
    rows, wires = make(1)
    kept = prune(rows, wires, node_share, edge_share)
    nodes, edges = dense_prune(rows, node_share, edge_share)
    assert torch.equal(kept.nodes_S, nodes)
    assert torch.equal(kept.edges_RS, edges)
    assert bool(kept.nodes_S[-TOKENS:].all())


def dense_prune(rows: Tensor, node_share: float, edge_share: float) -> tuple[Tensor, Tensor]:
    whole, weight = square(rows)

    def least(values: Tensor, share: float) -> float:
        reached, total = 0.0, float(values.sum())
        for value in sorted(values.flatten().tolist(), reverse=True):
            reached += value
            if reached / total >= share:
                return value
        return 0.0

    found, _ = dense_influence(whole, weight)
    keep = found >= least(found, node_share)
    keep[-LOGITS - TOKENS :] = True
    left = whole * keep[:, None] * keep[None, :]
    through, share = dense_influence(left, weight)
    score = share * (through + weight)[:, None]
    edges = (score >= least(score, edge_share)) & (score > 0)
    changed = True
    while changed:
        changed = False
        for node in range(COLUMNS - TOKENS):
            feeds = bool(edges[:, node].any())
            fed = node >= FEATURES or bool(edges[node].any())
            if keep[node] and not (feeds and fed):
                keep[node] = False
                edges[node], edges[:, node] = False, False
                changed = True
    inner = torch.cat([edges[:FEATURES], edges[COLUMNS:]])[:, :COLUMNS]
    return keep[:COLUMNS], inner


def test_f38_no_influence_at_all_is_no_error() -> None:
    """Nothing fires and nothing is explained."""
    rows, wires = make()
    kept = prune(torch.zeros_like(rows), wires, 0.8, 0.98)
    assert not bool(kept.edges_RS.any())
    assert scores(torch.zeros_like(rows), wires, torch.ones(COLUMNS, dtype=torch.bool)).replacement == 0
    assert float(threshold(torch.zeros(3), 0.5)) == 0


def test_cumulative_shares_end_at_one() -> None:
    reached = cumulative(torch.tensor([1.0, 3.0, 0.0, 4.0]))
    assert reached.tolist() == pytest.approx([1.0, 0.875, 1.0, 0.5])
