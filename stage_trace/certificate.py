"""Whether a graph tells the truth: its most influential features ablated one by one, predicted against actual.

The prediction follows the graph's edges along paths of every length. What the model does is measured three times: with
attention patterns and norm factors held, which tests the dictionaries and the edges; with norm factors alone held; and
with everything free to respond. The last two test the graph's own premise, that patterns and factors may be held, and
say which of them may not.

A second figure asks for less, of many more features: whether those with more influence move the next token's whole
distribution more, with everything free. Influence has no sign and is of all logits, so that it is ranked against a
divergence, not against the change of one logit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_trace.graph import Graph
from stage_trace.intervene import Mode, Outcome, intervene, predict
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
class Divergence:
    """One feature set to zero with everything free, and what the next token's distribution does."""

    node: Node
    kl: float
    """KL(before || after), in nats."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Ablations of the most influential features."""

    logit: Node
    ablations: tuple[Ablation, ...]
    divergences: tuple[Divergence, ...] = ()
    """Of many more features, the most influential first."""

    def influence_correlation(self) -> float | None:
        """Spearman's, of the features' influence with their divergence; None for fewer than `FEWEST` features."""
        if len(self.divergences) < FEWEST:
            return None
        influence = torch.tensor([one.node.influence or 0.0 for one in self.divergences], dtype=torch.float64)
        return spearman(influence, torch.tensor([one.kl for one in self.divergences], dtype=torch.float64))

    def rank_correlation(self, mode: Mode) -> float | None:
        """Spearman's, of what was predicted with what happened; None for fewer than `FEWEST` features."""
        if len(self.ablations) < FEWEST:
            return None
        return spearman(self._column(lambda one: one.predicted), self._column(lambda one: one.actual[mode]))

    def ceiling(self) -> float | None:
        """Spearman's, of the model's own response with norm factors held and with everything free.

        Nothing that holds norm factors, a graph of perfect dictionaries included, can be expected to rank what happens
        with everything free much better. None for fewer than `FEWEST` features.
        """
        if len(self.ablations) < FEWEST:
            return None
        held, free = (self._column(lambda one: one.actual[Mode.norms]), self._column(lambda one: one.actual[Mode.open]))
        return spearman(held, free)

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
            "ceiling": self.ceiling(),
            "influence": {"features": len(self.divergences), "rank_correlation": self.influence_correlation()},
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


def certify(graph: Graph, most: int = 10, ranked: int = 100) -> Certificate:
    """Ablate the `most` influential features of `graph`, each alone, and with everything free the `ranked` first."""
    features = [node for node in graph.sources if node.kind is Kind.feature]
    features.sort(key=lambda node: -(node.influence or 0.0))
    logit = graph.logits[0]
    divergences = []

    def free(node: Node) -> Outcome:
        outcome = intervene(graph, {node.id: 0.0}, Mode.open)
        assert outcome.kl is not None
        divergences.append(Divergence(node, outcome.kl))
        return outcome

    def ablate(node: Node) -> Ablation:
        values = {node.id: 0.0}
        outcomes = {mode: free(node) if mode is Mode.open else intervene(graph, values, mode) for mode in MEASURED}
        actual = {mode: outcome.of(logit.id) for mode, outcome in outcomes.items()}
        return Ablation(node, predict(graph, values).of(logit.id), actual)

    ablations = tuple(map(ablate, features[:most]))
    for node in features[most:ranked]:
        free(node)
    return Certificate(logit, ablations, tuple(divergences[:ranked]))


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks, and constants correlate with nothing."""

    def ranks(values: Tensor) -> Tensor:
        below = (values[:, None] > values[None, :]).sum(1)
        equal = (values[:, None] == values[None, :]).sum(1)
        return below + (equal - 1) / 2

    a, b = ranks(x) - (len(x) - 1) / 2, ranks(y) - (len(y) - 1) / 2
    norm = float(a.square().sum() * b.square().sum()) ** 0.5
    return float((a * b).sum()) / norm if norm else 0.0
