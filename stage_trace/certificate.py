"""Whether a graph tells the truth: its most influential features ablated one by one, predicted against actual.

The prediction follows the graph's edges along paths of every length. What the model does is measured three times: with
attention patterns and norm factors held, which tests the dictionaries and the edges; with norm factors alone held; and
with everything free to respond. The last two test the graph's own premise, that patterns and factors may be held, and
say which of them may not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_trace.graph import Graph
from stage_trace.intervene import Mode, intervene, predict
from stage_trace.nodes import Kind, Node

FEWEST = 3
"""Features for which a rank correlation says something."""
MEASURED = (Mode.frozen, Mode.norms, Mode.open)


@dataclass(frozen=True, slots=True)
class Ablation:
    """One feature set to zero, and what the first logit does; logits less the mean of all."""

    node: Node
    predicted: float
    actual: Mapping[Mode, float]


@dataclass(frozen=True, slots=True)
class Certificate:
    """Ablations of the most influential features."""

    logit: Node
    ablations: tuple[Ablation, ...]

    def rank_correlation(self, mode: Mode) -> float | None:
        """Spearman's, of what was predicted with what happened; None for fewer than `FEWEST` features."""
        if len(self.ablations) < FEWEST:
            return None
        return spearman(self._column(lambda one: one.predicted), self._column(lambda one: one.actual[mode]))

    def relative_error(self, mode: Mode) -> float | None:
        """Root mean square of the difference over that of what happened."""
        if len(self.ablations) < FEWEST:
            return None
        actual = self._column(lambda one: one.actual[mode])
        error = self._column(lambda one: one.predicted) - actual
        return float(error.square().mean().sqrt() / actual.square().mean().sqrt().clamp_min(1e-30))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "logit": self.logit.id,
            **{
                mode.value: {
                    "rank_correlation": self.rank_correlation(mode),
                    "relative_error": self.relative_error(mode),
                }
                for mode in MEASURED
            },
            "ablations": [
                {
                    "node_id": one.node.id,
                    "predicted": one.predicted,
                    **{mode.value: actual for mode, actual in one.actual.items()},
                }
                for one in self.ablations
            ],
        }

    def _column(self, of: Callable[[Ablation], float]) -> Tensor:
        return torch.tensor([of(one) for one in self.ablations], dtype=torch.float64)


def certify(graph: Graph, most: int = 10) -> Certificate:
    """Ablate the `most` influential features of `graph`, each alone."""
    features = [node for node in graph.sources if node.kind is Kind.feature]
    features = sorted(features, key=lambda node: -(node.influence or 0.0))[:most]
    logit = graph.logits[0]

    def ablate(node: Node) -> Ablation:
        values = {node.id: 0.0}
        actual = {mode: intervene(graph, values, mode).of(logit.id) for mode in MEASURED}
        return Ablation(node, predict(graph, values).of(logit.id), actual)

    return Certificate(logit, tuple(map(ablate, features)))


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks, and constants correlate with nothing."""

    def ranks(values: Tensor) -> Tensor:
        below = (values[:, None] > values[None, :]).sum(1)
        equal = (values[:, None] == values[None, :]).sum(1)
        return below + (equal - 1) / 2

    a, b = ranks(x) - (len(x) - 1) / 2, ranks(y) - (len(y) - 1) / 2
    norm = float(a.square().sum() * b.square().sum()) ** 0.5
    return float((a * b).sum()) / norm if norm else 0.0
