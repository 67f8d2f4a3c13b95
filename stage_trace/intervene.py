"""Interventions: set latents of a prompt, run the model on, and see what its logits and other latents do.

A latent's new value adds (value - its present value) times its decoder row to what the MLP adds, or attention where a
Lorsa stands in for it. Four modes:

    constrained  patterns, norm factors and all outputs that are stood in for (of MLPs, and of attention with a Lorsa)
                 are those of the clean run: the direct effect, which is exactly what the graph's edges say
    frozen       patterns and norm factors are those of the clean run; MLPs compute, and attention mixes by its patterns
    norms        norm factors alone are those of the clean run
    open         everything computes

A Lorsa's own patterns are held where the model's are.
Shapes: R rows of the graph (features, then logits), D width of the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.lm.frozen import Recording, run
from shared.lm.hookpoint import HookPoint
from shared.sae.variants import Lorsa
from stage_trace.active import ActiveLatents, active, seen
from stage_trace.graph import Graph
from stage_trace.influence import ROWS_AT_A_TIME
from stage_trace.nodes import Kind, Node
from stage_trace.patterns import Patterns
from stage_trace.session import Session
from stage_trace.targets import Features


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
    site: str = "mlp_out"
    """Which output of the layer it writes: ``attn_out`` for a Lorsa's."""

    @property
    def output(self) -> HookPoint:
        """That output."""
        return HookPoint(self.layer, self.site)


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
    by_output: dict[HookPoint, list[Change]] = {}
    for change in changes:
        if change.output not in session.sources:
            raise GranaryError(f"no dictionary stands in for {change.output}")
        by_output.setdefault(change.output, []).append(change)

    stand_ins = {one.output: one for one in session.replacement.stand_ins}
    pending: dict[HookPoint, Tensor] = {}  # what changed latents add, by the output that they write

    def changed(output: HookPoint, added_TD: Tensor, sites: dict[HookPoint, Tensor]) -> Tensor:
        latents, skip = stand_ins[output].latents, stand_ins[output].skip
        if mode is Mode.constrained:
            added_TD = session.recording.sites[output]
            if skip is not None:
                added_TD = added_TD + (sites[latents.read] - session.recording.sites[latents.read]) @ skip.T
        if output in by_output:
            present = latents if mode is Mode.constrained else _encoded(session, latents, sites, mode)
            for target, more_TD in _added(session, by_output[output], sites, present).items():
                pending[target] = pending.get(target, 0) + more_TD
        return added_TD + pending[output] if output in pending else added_TD

    sites = [*(one.latents.read for one in stand_ins.values()), *stand_ins]
    held = {Mode.open: None, Mode.norms: replace(session.recording, patterns=[])}
    frozen = held.get(mode, session.recording)
    after = run(session.model, session.parts, session.tokens_T, sites, frozen=frozen, change=changed)
    before = session.recording
    features_N = _moved(graph, session, after, mode)
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
    outputs, columns = graph.wiring.row_output_R, graph.wiring.row_column_R
    for output in torch.unique(outputs).tolist():
        rows = torch.nonzero(outputs == output).flatten()
        change_R[rows] = graph.rows_RS[rows].double() @ (given_S if direct else relative_S)
        free = rows[(columns[rows] >= 0) & (given_S[columns[rows].clamp_min(0)] == 0)]
        relative_S[columns[free]] = change_R[free] / activation_S[columns[free]]
    return Outcome(graph.targets, change_R)


def _moved(graph: Graph, session: Session, after: Recording, mode: Mode) -> Tensor:
    """How far the pre-activations of the graph's features have moved."""
    before, features = session.recording, Features.of(session.replacement)
    chosen = session.numbers(node for node in graph.targets if node.kind is Kind.feature)
    moved_N = features.goal_N.new_zeros(len(chosen))
    output_N = features.output_N[chosen]
    for number in torch.unique(output_N).tolist():
        latents = session.replacement.stand_ins[number].latents
        patterns = _patterns(session, latents, after.sites, mode)
        for some in torch.split(torch.nonzero(output_N == number).flatten(), ROWS_AT_A_TIME):
            targets = features[chosen[some]]
            which = targets.latent_B, targets.position_B
            after_BD = seen(patterns, *which, after.sites[latents.read])
            before_BD = seen(latents.patterns, *which, before.sites[latents.read])
            moved_N[some] = ((after_BD - before_BD) * targets.vector_BD).sum(1)
    return moved_N


def _patterns(
    session: Session, latents: ActiveLatents, sites: Mapping[HookPoint, Tensor], mode: Mode
) -> Patterns | None:
    """By which patterns a Lorsa's latents read `sites`: those of the clean run where the model's are held."""
    if latents.patterns is None or mode in (Mode.constrained, Mode.frozen):
        return latents.patterns
    source, _ = session.sources[latents.weights.place.own]
    dictionary = source.open()
    assert isinstance(dictionary, Lorsa)
    return Patterns.of_prompt(dictionary, latents.weights.folded, sites[latents.read])


def _change(node: Node, value: float) -> Change:
    if node.kind is not Kind.feature:
        raise GranaryError(f"{node.id} is no feature ({node.kind.value}): interventions set features")
    return Change(node.layer, node.position, node.number, value, node.site)


def _encoded(session: Session, latents: ActiveLatents, sites: Mapping[HookPoint, Tensor], mode: Mode) -> ActiveLatents:
    """The latents of the same group, encoded again from what they read of `sites`."""
    place = latents.weights.place
    source, number = session.sources[place.own]
    dictionary, patterns = source.open(), _patterns(session, latents, sites, mode)
    rows, fixed_T = source.rows(dictionary)[number], session.replacement.fixed_T
    return active(dictionary, rows, number, place, sites[place.read], fixed_T, patterns)


def _added(
    session: Session, changes: Sequence[Change], sites: Mapping[HookPoint, Tensor], present: ActiveLatents
) -> dict[HookPoint, Tensor]:
    """[T, D] by output: what changes of latents of one group, which are `present`, add there."""
    source, number = session.sources[present.weights.place.own]
    num_latents = source.open().groups[number].num_latents
    x_TD = sites[present.read]
    added = {output: torch.zeros_like(x_TD) for output in present.writes}
    for change in changes:
        if not (0 <= change.latent < num_latents and 0 <= change.position < len(x_TD)):
            raise GranaryError(f"{change.output} has no latent {change.latent} at position {change.position}")
        is_it = (present.position_N == change.position) & (present.latent_N == change.latent)
        value = float(present.value_N[is_it].sum())
        for output in present.writes:
            (row_D,) = present.weights.decoder(output, torch.tensor([change.latent]))
            added[output][change.position] += (change.value - value) * row_D
    return added
