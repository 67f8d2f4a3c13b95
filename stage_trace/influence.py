"""How much each node of a graph matters to its logits, which nodes and edges are worth showing, and two scores.

Rows are normalised to shares, N_ts = |A_ts| / sum_s |A_ts|, and influence flows back along them from the logits, whose
weights are their probabilities:  inf = w N + w N^2 + ...  A row's sources write earlier outputs than its own, so one
pass from the top gives the whole series. Definitions are circuit-tracer 0.5.0's (Hanna et al. 2025; Ameisen et al.
2025), on rows that may have more kinds of sources. Shapes: R rows, S columns (sources).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_A_TIME = 64
"""Rows that are looked at in double precision at once."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the rows and columns of a matrix are, as far as influence needs it."""

    row_output_R: Tensor
    """int64: the output that a row's feature writes first, in the order of the computation; logits come after all."""
    row_column_R: Tensor
    """int64: the column of the same node, -1 for logits, which feed nothing."""
    weight_R: Tensor
    """Probabilities of the logits, 0 elsewhere."""
    may_drop_S: Tensor
    """bool: all columns but the tokens'."""


def shares(rows_RS: Tensor) -> Tensor:
    """Rows of absolute values that sum to 1, in double precision; a row of zeros stays one."""
    absolute = rows_RS.double().abs()
    return absolute / absolute.sum(1, keepdim=True).clamp_min(1e-10)


def influence(rows_RS: Tensor, wiring: Wiring) -> Tensor:
    """[S], double: what reaches each column from the logits, over paths of every length.

    Rows are normalised a few at a time: no second matrix of their size is made.
    """
    found_S = rows_RS.new_zeros(rows_RS.shape[1], dtype=torch.float64)
    weight_R = wiring.weight_R.double()
    for output in torch.unique(wiring.row_output_R).flip(0).tolist():
        rows = torch.nonzero(wiring.row_output_R == output).flatten()
        through = flow(found_S, wiring, weight_R)[rows]  # rows of one output feed none of them
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            some = slice(start, start + ROWS_AT_A_TIME)
            found_S += through[some] @ shares(rows_RS[rows[some]])
    return found_S


def flow(influence_S: Tensor, wiring: Wiring, weight_R: Tensor) -> Tensor:
    """[R]: the influence of each row's own node, and its weight."""
    own_R = influence_S[wiring.row_column_R.clamp_min(0)].masked_fill(wiring.row_column_R < 0, 0)
    return own_R + weight_R


@dataclass(frozen=True, slots=True)
class Scores:
    """How much of a graph goes through features."""

    replacement: float
    """Of the influence that ends in tokens or errors, the share that ends in tokens."""
    completeness: float
    """Share of nodes' inputs that are not errors, weighted by the nodes' influence."""


def scores(rows_RS: Tensor, wiring: Wiring, is_error_S: Tensor, is_dropped_S: Tensor | None = None) -> Scores:
    """Compute both with the columns `is_dropped_S` left out before rows are normalised."""
    if is_dropped_S is not None:
        rows_RS = rows_RS.masked_fill(is_dropped_S, 0)
    found_S = influence(rows_RS, wiring)
    tokens, errors = found_S[~wiring.may_drop_S].sum(), found_S[is_error_S].sum()
    if not float(tokens + errors):
        return Scores(0.0, 0.0)
    through_R = flow(found_S, wiring, wiring.weight_R.double())
    lost = 0.0
    for start in range(0, len(rows_RS), ROWS_AT_A_TIME):
        some = slice(start, start + ROWS_AT_A_TIME)
        lost += float(through_R[some] @ shares(rows_RS[some])[:, is_error_S].sum(1))
    total = found_S.sum() + wiring.weight_R.double().sum()  # nodes without a row have no inputs to lose
    return Scores(float(tokens / (tokens + errors)), 1 - lost / float(total))


def threshold(values: Tensor, share: float) -> Tensor:
    """The least of the largest values that together make up `share` of all."""
    ordered = torch.sort(values, descending=True).values
    total = ordered.sum()
    if not float(total):
        return total
    at = int(torch.searchsorted(torch.cumsum(ordered, 0) / total, share))
    return ordered[min(at, len(ordered) - 1)]


@dataclass(frozen=True, slots=True)
class Kept:
    """What pruning keeps."""

    nodes_S: Tensor
    edges_RS: Tensor


def prune(rows_RS: Tensor, wiring: Wiring, node_share: float, edge_share: float) -> Kept:
    """Nodes that make up `node_share` of the influence, then edges that make up `edge_share` of what is left.

    Tokens and logits stay. A feature that no edge reaches or leaves goes, and an error that none leaves; until stable.
    """
    found_S = influence(rows_RS, wiring)
    nodes_S = (found_S >= threshold(found_S, node_share)) | ~wiring.may_drop_S
    is_feature_R = wiring.row_column_R >= 0
    column_R = wiring.row_column_R[is_feature_R]

    def rows_kept() -> Tensor:
        kept_R = torch.ones_like(is_feature_R)
        kept_R[is_feature_R] = nodes_S[column_R]
        return kept_R

    # Of all else the shares are zero: edges are looked for among the nodes that are left.
    rows, columns = torch.nonzero(rows_kept()).flatten(), torch.nonzero(nodes_S).flatten()
    left = shares(rows_RS[rows][:, columns])
    through = flow(_among(rows_RS, nodes_S, rows, wiring), wiring, wiring.weight_R.double())[rows]
    edge = left * through[:, None]
    is_kept = (edge >= threshold(edge.flatten(), edge_share)) & (edge > 0)
    edges_RS = torch.zeros_like(rows_RS, dtype=torch.bool)
    edges_RS[rows[:, None], columns[None, :]] = is_kept
    while True:
        before_S = nodes_S.clone()
        nodes_S = nodes_S & (edges_RS.any(0) | ~wiring.may_drop_S)
        nodes_S[column_R] &= edges_RS[is_feature_R].any(1)
        edges_RS &= nodes_S
        edges_RS &= rows_kept()[:, None]
        if torch.equal(before_S, nodes_S):
            return Kept(nodes_S, edges_RS)


def _among(rows_RS: Tensor, nodes_S: Tensor, rows: Tensor, wiring: Wiring) -> Tensor:
    """Influence [S] over paths through `nodes_S` alone."""
    fewer = Wiring(wiring.row_output_R[rows], wiring.row_column_R[rows], wiring.weight_R[rows], wiring.may_drop_S)
    return influence(rows_RS[rows] * nodes_S, fewer)


def cumulative(influence_S: Tensor) -> Tensor:
    """[S]: with the nodes in order of influence, the share of all of it that is reached with this one."""
    ordered, order = torch.sort(influence_S, descending=True, stable=True)
    reached = torch.cumsum(ordered, 0) / ordered.sum().clamp_min(1e-30)
    return torch.zeros_like(influence_S).scatter_(0, order, reached)
