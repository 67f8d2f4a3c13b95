"""All rows of a graph in batches, or of its most influential features where there are too many."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_trace.influence import Wiring, influence, shares
from stage_trace.leaves import Columns
from stage_trace.targets import Targets

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
    features: Targets,
    logits: Targets,
    probabilities: Tensor,
    columns: Columns,
    *,
    most: int,
    batch: int,
) -> Matrix:
    """The rows of all features, or of the `most` influential ones by what is known of the others' paths so far.

    What a feature without a row contributes is part of the error of its layer and position: rows still add up.
    """
    total = len(features)
    most = min(most, total)
    chosen = torch.zeros(total, dtype=torch.bool)
    found = {"logits": engine(logits).cpu()}
    worst = gap(found["logits"], logits.goal_B)
    rows_FS = found["logits"].new_zeros(total if most == total else 0, columns.total)
    parts: list[tuple[Tensor, Tensor]] = []
    while int(chosen.sum()) < most:
        if most == total:
            pending = torch.argsort(features.position_B.cpu(), stable=True)  # short sweeps first
        else:
            ranked = torch.argsort(_known(parts, found["logits"], features, probabilities), descending=True)
            pending = ranked[~chosen[ranked]][: min(UPDATE_BATCHES * batch, most - int(chosen.sum()))]
        for some in torch.split(pending, batch):
            targets = features[some.to(features.layer_B.device)]
            rows = engine(targets).cpu()
            worst = max(worst, gap(rows, targets.goal_B))
            chosen[some] = True
            if most == total:
                rows_FS[some] = rows
            else:
                parts.append((some, rows))
    numbers = torch.nonzero(chosen).flatten()
    if parts:
        order = torch.argsort(torch.cat([some for some, _ in parts]))
        rows_FS = torch.cat([rows for _, rows in parts])[order]
    rows_RS = torch.cat([rows_FS, found["logits"]])
    if most < total:
        rows_RS, columns = _fold(rows_RS, features, numbers, chosen, columns)
    return Matrix(rows_RS, numbers, columns, worst)


def gap(rows_BS: Tensor, goal_B: Tensor) -> float:
    """Worst difference of a row's sum, relative to the larger of its goal and its largest entry; 0 without rows."""
    if not len(rows_BS):
        return 0.0
    wide_BS, goal_B = rows_BS.double(), goal_B.double().to(rows_BS.device)
    scale_B = torch.maximum(goal_B.abs(), wide_BS.abs().max(1).values).clamp_min(1e-30)
    return float(((wide_BS.sum(1) - goal_B).abs() / scale_B).max())


def wiring(row_layers: Tensor, row_columns: Tensor, probabilities: Tensor, columns: Columns) -> Wiring:
    """Of rows of features, and of the logits below them."""
    may_drop_S = torch.ones(columns.total, dtype=torch.bool)
    may_drop_S[columns.tokens] = False
    n = len(probabilities)
    return Wiring(
        torch.cat([row_layers.cpu(), torch.full((n,), columns.num_layers)]),
        torch.cat([row_columns.cpu(), torch.full((n,), -1)]),
        torch.cat([torch.zeros(len(row_layers), dtype=probabilities.dtype), probabilities.cpu()]),
        may_drop_S,
    )


def _known(parts: list[tuple[Tensor, Tensor]], logits_RS: Tensor, features: Targets, probabilities: Tensor) -> Tensor:
    """Influence of every feature over the rows that are there."""
    numbers = torch.cat([some for some, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    rows_RS = torch.cat([*(rows for _, rows in parts), logits_RS])
    n, may_drop_S = len(probabilities), torch.ones(rows_RS.shape[1], dtype=torch.bool)
    layers = features.layer_B.cpu()[numbers]
    known = Wiring(
        torch.cat([layers, torch.full((n,), int(features.layer_B.max()) + 1)]),
        torch.cat([numbers, torch.full((n,), -1)]),
        torch.cat([torch.zeros(len(numbers), dtype=probabilities.dtype), probabilities.cpu()]),
        may_drop_S,
    )
    return influence(shares(rows_RS), known)[: len(features)]


def _fold(
    rows_RS: Tensor, features: Targets, numbers: Tensor, chosen: Tensor, columns: Columns
) -> tuple[Tensor, Columns]:
    """The columns of the features that are left out, added to the error of their layer and position."""
    out = torch.nonzero(~chosen).flatten()
    layer, position = features.layer_B.cpu()[out], features.position_B.cpu()[out]
    rows_RS = rows_RS.index_add(1, columns.errors.start + layer * columns.num_positions + position, rows_RS[:, out])
    kept = torch.cat([numbers, torch.arange(columns.num_features, columns.total)])
    fewer = Columns(len(numbers), columns.num_layers, columns.num_positions, columns.fixed)
    return rows_RS[:, kept], fewer
