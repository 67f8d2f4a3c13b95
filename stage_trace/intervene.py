"""Interventions: set latents of a prompt, run the model on, and see what its logits and other latents do.

A latent's new value adds (value - its present value) times its decoder row to what the MLP adds. Four modes:

    constrained  patterns, norm factors and all MLP outputs are those of the clean run: the direct effect, which is
                 exactly what the graph's edges say
    frozen       patterns and norm factors are those of the clean run, MLPs compute
    norms        norm factors alone are those of the clean run
    open         everything computes

Shapes: R rows of the graph (features, then logits), D width of the stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.frozen import run
from shared.lm.hookpoint import HookPoint
from stage_trace.graph import Graph
from stage_trace.influence import ROWS_AT_A_TIME
from stage_trace.nodes import Kind, Node
from stage_trace.replacement import LayerLatents, active
from stage_trace.session import Session
from stage_trace.targets import Features, Targets


class Mode(Enum):
    """What of the clean run is held."""

    constrained = "constrained"
    frozen = "frozen"
    norms = "norms"
    open = "open"


@dataclass(frozen=True, slots=True)
class Change:
    """A latent set to a value at one position; it need not fire there."""

    layer: int
    position: int
    latent: int
    value: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the graph's rows: pre-activations of features, and logits less the mean of all logits."""

    targets: tuple[Node, ...]
    change_R: Tensor
    """After less before."""
    kl: float | None = None
    """KL(before || after) of the next token, in nats, over the whole vocabulary; None of what was only predicted."""

    def of(self, identifier: str) -> float:
        """The change of one node; raises GranaryError for one that has no row."""
        for node, change in zip(self.targets, self.change_R.tolist(), strict=True):
            if node.id == identifier:
                return float(change)
        raise GranaryError(f"{identifier} is no feature or logit of the graph")


@torch.no_grad()
def intervene(graph: Graph, values: Mapping[str, float] | Sequence[Change], mode: Mode | str = Mode.open) -> Outcome:
    """Set features, given as ids of the graph's nodes or as changes of any latents.

    Raises GranaryError for a graph that was read from a file, and for nodes that are no features.
    """
    session = graph.need_session()
    try:
        mode = Mode(mode)
    except ValueError:
        raise GranaryError(f"mode={mode!r}: choose from {', '.join(one.value for one in Mode)}") from None
    changes = (
        [_change(graph.node(name), value) for name, value in values.items()] if isinstance(values, Mapping) else values
    )
    by_layer: dict[int, list[Change]] = {}
    for change in changes:
        if change.layer not in session.sources:
            raise GranaryError(f"no dictionary stands in for layer {change.layer}")
        by_layer.setdefault(change.layer, []).append(change)

    pending: dict[int, Tensor] = {}  # what changed latents add, by the layer whose MLP they write

    def change_mlp(layer: int, added_TD: Tensor, sites: dict[HookPoint, Tensor]) -> Tensor:
        stand_in = session.replacement.layers[layer]
        if mode is Mode.constrained:
            added_TD = session.recording.mlp_out(layer)
            if stand_in.skip is not None:
                read = stand_in.latents.read
                added_TD = added_TD + (sites[read] - session.recording.sites[read]) @ stand_in.skip.T
        if layer in by_layer:
            present = stand_in.latents if mode is Mode.constrained else None
            for target, more_TD in _added(session, layer, by_layer[layer], sites, present).items():
                pending[target] = pending.get(target, 0) + more_TD
        return added_TD + pending[layer] if layer in pending else added_TD

    sites = [layer.latents.read for layer in session.replacement.layers]
    held = {Mode.open: None, Mode.norms: replace(session.recording, patterns=[])}
    frozen = held.get(mode, session.recording)
    after = run(session.model, session.parts, session.tokens_T, sites, frozen=frozen, change_mlp=change_mlp)
    before = session.recording
    moved = [after.sites[site] - before.sites[site] if site in before.sites else None for site in sites]
    features = Features.of(session.replacement)
    chosen = session.numbers(node for node in graph.targets if node.kind is Kind.feature)
    changed = [before.final_TD.new_zeros(0)]
    for some in torch.split(chosen, ROWS_AT_A_TIME):
        for layer, position, vector_D in _readings(features[some]):
            moved_TD = moved[layer]
            assert moved_TD is not None
            changed.append((moved_TD[position] @ vector_D)[None])
    features_N = torch.cat(changed)
    tokens = torch.tensor([node.number for node in graph.logits], device=features_N.device)
    vector_BD = session.parts.logit_vectors(tokens, before.final_TD.dtype)
    logits_B = vector_BD @ (after.final_TD[-1] - before.final_TD[-1])
    said_V, says_V = (torch.log_softmax(one.logits_V.double(), -1) for one in (before, after))
    kl = float((said_V.exp() * (said_V - says_V)).sum())
    return Outcome(graph.targets, torch.cat([features_N, logits_B]).cpu(), kl)


def predict(graph: Graph, values: Mapping[str, float], *, direct: bool = False) -> Outcome:
    """What the graph's edges say of the same: along paths of every length, or along single edges where `direct`.

    Other features follow linearly, errors stay.
    """
    column_of = {node.id: column for column, node in enumerate(graph.sources)}
    relative_S = torch.zeros(graph.rows_RS.shape[1], dtype=torch.float64)
    for name, value in values.items():
        change = _change(graph.node(name), value)
        activation = graph.sources[column_of[name]].activation
        assert activation is not None
        relative_S[column_of[name]] = change.value / activation - 1
    given_S = relative_S.clone()
    change_R = torch.zeros(len(graph.rows_RS), dtype=torch.float64)
    activation_S = torch.tensor([node.activation or 1.0 for node in graph.sources], dtype=torch.float64)
    layers, columns = graph.wiring.row_layer_R, graph.wiring.row_column_R
    for layer in torch.unique(layers).tolist():
        rows = torch.nonzero(layers == layer).flatten()
        change_R[rows] = graph.rows_RS[rows].double() @ (given_S if direct else relative_S)
        free = rows[(columns[rows] >= 0) & (given_S[columns[rows].clamp_min(0)] == 0)]
        relative_S[columns[free]] = change_R[free] / activation_S[columns[free]]
    return Outcome(graph.targets, change_R)


def _change(node: Node, value: float) -> Change:
    if node.kind is not Kind.feature:
        raise GranaryError(f"{node.id} is no feature ({node.kind.value}): interventions set features")
    return Change(node.layer, node.position, node.number, value)


def _added(
    session: Session,
    layer: int,
    changes: Sequence[Change],
    sites: Mapping[HookPoint, Tensor],
    present: LayerLatents | None,
) -> dict[int, Tensor]:
    """[T, D] by layer: what the changes add to MLP outputs; `present` None: latents are encoded again."""
    source, number = session.sources[layer]
    dictionary, place = source.open(), source.places[number]
    x_TD = sites[place.read]
    if present is None:
        rows = source.rows(dictionary)[number]
        present = active(dictionary, rows, number, place, x_TD, session.replacement.fixed_T)
    group = dictionary.groups[number]
    added = {target: torch.zeros_like(x_TD) for target in place.layers}
    for change in changes:
        if not (0 <= change.latent < group.num_latents and 0 <= change.position < len(x_TD)):
            raise GranaryError(f"layer {layer} has no latent {change.latent} at position {change.position}")
        is_it = (present.position_N == change.position) & (present.latent_N == change.latent)
        value = float(present.value_N[is_it].sum())
        for target in place.layers:
            (row_D,) = present.weights.decoder(target, torch.tensor([change.latent]))
            added[target][change.position] += (change.value - value) * row_D
    return added


def _readings(targets: Targets) -> Iterator[tuple[int, int, Tensor]]:
    """Layer, position and vector of each."""
    yield from zip(targets.layer_B.tolist(), targets.position_B.tolist(), targets.vector_BD, strict=True)
