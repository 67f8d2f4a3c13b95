"""All rows of a graph in batches, or of its most influential features where there are too many."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels.add_at import add_at
from stage_trace.influence import ROWS_AT_A_TIME, Wiring, influence
from stage_trace.leaves import Columns
from stage_trace.targets import Features, Targets

UPDATE_BATCHES = 4
"""Batches of features between two estimates of which matter most."""

Engine = Callable[[Targets], Tensor]
"""Rows [B, S] of some targets."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """The rows of the chosen features, in column order, and of the logits below them; columns of the others folded."""

    rows_RS: Tensor
    chosen: Tensor
    """int64: which of all active features, ascending."""
    columns: Columns
    worst_gap: float
    """Largest difference between a row's sum and what it must sum to, over the larger of that and its largest entry."""


def build_matrix(
    engine: Engine,
    features: Features,
    logits: Targets,
    probabilities: Tensor,
    columns: Columns,
    *,
    most: int,
    batch: int,
) -> Matrix:
    """The rows of all features, or of the `most` influential ones by what is known of the others' paths so far.

    What a feature without a row contributes is part of the error of its output and position: rows still add up.
    """
    total, n = len(features), len(logits)
    most = min(most, total)
    said = engine(logits).cpu()
    worst = gap(said, logits.goal_B)
    rows_RS = said.new_zeros(most + n, columns.total)  # the features in the order they come, behind the logits
    rows_RS[:n] = said
    order: list[int] = []
    chosen = torch.zeros(total, dtype=torch.bool)
    while len(order) < most:
        if most == total:
            pending = torch.argsort(features.position_N.cpu(), stable=True)  # short sweeps first
        else:
            known = _known(rows_RS[: n + len(order)], torch.tensor(order, dtype=torch.int64), features, probabilities)
            ranked = torch.argsort(known, descending=True)
            pending = ranked[~chosen[ranked]][: min(UPDATE_BATCHES * batch, most - len(order))]
        for some in torch.split(pending, batch):
            targets = features[some.to(features.output_N.device)]
            rows_BS = engine(targets).cpu()
            worst = max(worst, gap(rows_BS, targets.goal_B))
            rows_RS[n + len(order) : n + len(order) + len(some)] = rows_BS
            chosen[some] = True
            order += some.tolist()
    by_column = torch.argsort(torch.tensor(order, dtype=torch.int64))
    numbers = torch.nonzero(chosen).flatten()
    in_order = torch.cat([n + by_column, torch.arange(n)])
    if most < total:
        rows_RS, columns = _fold(rows_RS, in_order, features, chosen, columns)
    else:
        rows_RS = rows_RS[in_order]
    return Matrix(rows_RS, numbers, columns, worst)


def gap(rows_BS: Tensor, goal_B: Tensor) -> float:
    """Worst difference of a row's sum, relative to the larger of its goal and its largest entry; 0 without rows."""
    worst = 0.0
    for start in range(0, len(rows_BS), ROWS_AT_A_TIME):
        some = slice(start, start + ROWS_AT_A_TIME)
        wide_BS, wide_B = rows_BS[some].double(), goal_B[some].to(rows_BS.device).double()
        scale_B = torch.maximum(wide_B.abs(), wide_BS.abs().amax(1)).clamp_min(1e-30)
        gap_B = (wide_BS.sum(1) - wide_B).abs() / scale_B
        worst = max(worst, float(gap_B.nan_to_num(nan=torch.inf).max()))
    return worst


def wiring(row_outputs: Tensor, row_columns: Tensor, probabilities: Tensor, columns: Columns) -> Wiring:
    """Compute that of rows of features, and of the logits below them."""
    may_drop_S = torch.ones(columns.total, dtype=torch.bool)
    may_drop_S[columns.tokens] = False
    n = len(probabilities)
    return Wiring(
        torch.cat([row_outputs.cpu(), torch.full((n,), len(columns.outputs))]),
        torch.cat([row_columns.cpu(), torch.full((n,), -1)]),
        torch.cat([torch.zeros(len(row_outputs), dtype=probabilities.dtype), probabilities.cpu()]),
        may_drop_S,
    )


def _known(rows_RS: Tensor, numbers: Tensor, features: Features, probabilities: Tensor) -> Tensor:
    """Influence of every feature over the rows that are there: those of the logits, then of the features `numbers`."""
    n = len(probabilities)
    outputs = features.output_N.cpu()
    known = Wiring(
        torch.cat([torch.full((n,), int(outputs.max()) + 1), outputs[numbers]]),
        torch.cat([torch.full((n,), -1), numbers]),
        torch.cat([probabilities.cpu(), torch.zeros(len(numbers), dtype=probabilities.dtype)]),
        torch.ones(rows_RS.shape[1], dtype=torch.bool),
    )
    return influence(rows_RS, known)[: len(features)]


def _fold(
    rows_RS: Tensor, in_order: Tensor, features: Features, chosen: Tensor, columns: Columns
) -> tuple[Tensor, Columns]:
    """The rows in order, columns of features that are left out added to the error of their output and position."""
    out, numbers = torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
    output, position = features.output_N.cpu()[out], features.position_N.cpu()[out]
    kept = torch.cat([numbers, torch.arange(columns.num_features, columns.total)])
    fewer = Columns(len(numbers), columns.outputs, columns.num_positions, columns.fixed)
    into = fewer.errors.start + output * columns.num_positions + position
    folded_RS = rows_RS.new_empty(len(rows_RS), fewer.total)
    for start in range(0, len(in_order), ROWS_AT_A_TIME):
        some = rows_RS[in_order[start : start + ROWS_AT_A_TIME]]
        added_SR = some[:, kept].T.contiguous()
        add_at(added_SR, into, some[:, out].T)
        folded_RS[start : start + len(some)] = added_SR.T
    return folded_RS, fewer
