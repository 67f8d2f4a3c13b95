"""Which attention heads carry an edge: its weight split by the head that first moves it on.

What a source writes reaches a target along the stream of its own position, or some head of a later layer reads it there
first. The gradient that arrives at a source is the sum of what these heads give and what stays, so that

    edge = stays + sum over heads of  (W_V norm(source)) . (gradient of the head's values at the source's position)

and an edge between two positions is the sum over heads alone. Attention that a Lorsa stands in for has no such heads:
its latents are nodes, and what one of them reads at other positions it carries itself. One more sweep of the targets
gives all of it.
Shapes: S sources, B targets, D width of the stream, E head dimension, M heads kept of an edge.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import Norm
from stage_trace.graph import Edge, Graph
from stage_trace.nodes import Kind, Node
from stage_trace.session import Session
from stage_trace.sweep import sweep
from stage_trace.targets import Features, Logits, Targets, logit_targets

AT_ONCE = 64
"""Targets of one sweep."""
MOST = 3
"""Heads of an edge that are kept."""
LEAST = 0.01
"""Share of a target's shown edges below which an edge is not split, and of an edge below which a head is not kept."""

Split = dict[tuple[str, str], list[tuple[int, int, float]]]
"""By source and target: layer, head and what it carries, the strongest first."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What all heads together and the strongest ones carry from every source to every target."""

    moved_SB: Tensor
    weight_SBM: Tensor
    head_SBM: Tensor
    """Layer times number of heads, plus head."""


def split_edges(graph: Graph) -> Split:
    """The heads of the edges that a graph shows; empty for one that was read from a file."""
    session = graph.session
    if session is None:
        return {}
    shown = {node.id for node in graph.nodes}
    edges = [edge for edge in graph.edges if edge.source.id in shown and edge.target.id in shown]
    total: dict[str, float] = {}
    for edge in edges:
        total[edge.target.id] = total.get(edge.target.id, 0.0) + abs(edge.weight)
    strong = [e for e in edges if abs(e.weight) >= LEAST * total[e.target.id] and e.source.kind is not Kind.bias]
    sources, targets = (
        list(dict.fromkeys(nodes)) for nodes in ([e.source for e in strong], [e.target for e in strong])
    )
    return _listed(session, strong, sources, targets) if strong else {}


def _listed(session: Session, edges: list[Edge], sources: list[Node], targets: list[Node]) -> Split:
    H = len(session.parts.layers[0].heads.W_O_HDE)
    row = {node: number for number, node in enumerate(sources)}
    found: Split = {}
    for start in range(0, len(targets), AT_ONCE):
        some = targets[start : start + AT_ONCE]
        column = {node: number for number, node in enumerate(some)}
        heads = carried(session, sources, as_targets(session, some))
        for edge in edges:
            if edge.target not in column:
                continue
            at = row[edge.source], column[edge.target]
            pairs = zip(heads.head_SBM[at].tolist(), heads.weight_SBM[at].tolist(), strict=True)
            kept = [(head // H, head % H, w) for head, w in pairs if abs(w) >= LEAST * abs(edge.weight) and w]
            if kept:
                found[edge.source.id, edge.target.id] = kept
    return found


def as_targets(session: Session, nodes: list[Node]) -> Targets:
    """Features and logits as what a sweep begins with, in their order."""
    features = [number for number, node in enumerate(nodes) if node.kind is Kind.feature]
    others = [number for number, node in enumerate(nodes) if node.kind is Kind.logit]
    parts = []
    if features:
        parts.append(Features.of(session.replacement)[session.numbers([nodes[n] for n in features])])
    if others:
        tokens = [nodes[n].number for n in others]
        logits = Logits.choose(session.recording.logits_V, 1.0, len(tokens), tokens)
        parts.append(logit_targets(logits, session.parts, session.recording, len(session.columns.outputs)))
    joined = Targets.joined(parts)
    return joined[torch.argsort(torch.tensor([*features, *others], device=joined.output_B.device))]


@torch.no_grad()
def carried(session: Session, sources: list[Node], targets: Targets, most: int = MOST) -> Heads:
    """What heads carry from each source to each target."""
    parts, recording = session.parts, session.recording
    H = len(parts.layers[0].heads.W_O_HDE)
    T = int(targets.position_B.max()) + 1
    inside = [number for number, node in enumerate(sources) if node.position < T]
    position_S = torch.tensor([sources[n].position for n in inside], device=targets.position_B.device)
    like = targets.vector_BD
    shape = len(sources), len(targets)
    moved_SB, weight_SBM = like.new_zeros(shape), like.new_zeros(*shape, most)
    head_SBM = torch.zeros(*shape, most, dtype=torch.int64, device=like.device)
    written_SD = like.new_zeros(len(inside), like.shape[1])
    read_at: dict[int, Tensor] = {}

    def written(layer: int) -> Tensor:
        """What the sources have written before attention of `layer`, as its values read it."""
        if layer not in read_at:
            written_SD.zero_()
            for row, number in enumerate(inside):
                written_SD[row] = _written(session, sources[number], layer)
            norm, scale_T1 = parts.layers[layer].attention_norm, recording.scales[layer, "attention"]
            read_at.clear()  # the layers come one after the other
            read_at[layer] = _linear(norm, written_SD, scale_T1[position_S])
        return read_at[layer]

    def see(layer: int, head: int, values_TBE: Tensor) -> None:
        heads = parts.layers[layer].heads
        value_SE = written(layer) @ heads.W_V_KED[head // heads.per_group].to(like).T
        given_SB = torch.einsum("sbe,se->sb", values_TBE[position_S], value_SE)
        moved_SB[inside] += given_SB
        weights_SBM = torch.cat([weight_SBM[inside], given_SB[..., None]], -1)
        numbers_SBM = torch.cat([head_SBM[inside], torch.full_like(head_SBM[inside, :, :1], layer * H + head)], -1)
        kept = weights_SBM.abs().topk(most).indices
        weight_SBM[inside], head_SBM[inside] = weights_SBM.gather(-1, kept), numbers_SBM.gather(-1, kept)

    if inside:
        sweep(parts, recording, session.replacement, session.columns, targets, see)
    return Heads(moved_SB, weight_SBM, head_SBM)


def _linear(norm: Norm, x_SD: Tensor, scale_S1: Tensor) -> Tensor:
    """What a norm makes of a part of its input, its factor given."""
    if norm.is_centred:
        x_SD = x_SD - x_SD.mean(-1, keepdim=True)
    return x_SD * scale_S1.to(x_SD) * norm.weight_D.to(x_SD)


def _written(session: Session, node: Node, layer: int) -> Tensor | float:
    """What a node has written to its position of the stream before `layer`, [D]."""
    stand_ins, at = session.replacement.stand_ins, node.position
    match node.kind:
        case Kind.token:
            return session.recording.sites[HookPoint(0, "resid_pre")][at]
        case Kind.error if node.layer < layer:
            return stand_ins[session.columns.outputs.index(node.output)].error_TD[at]
        case Kind.fixed if node.layer < layer:
            return stand_ins[session.columns.outputs.index(node.output)].rest_PD[session.columns.fixed.index(at)]
        case Kind.feature:
            number = session.columns.outputs.index(node.output)
            latents = stand_ins[number].latents
            some = session.numbers([node]) - sum(len(one.latents.value_N) for one in stand_ins[:number])
            rows = [latents.decoder(output, some)[0] for output in latents.writes if output.layer < layer]
            return latents.value_N[some] * torch.stack(rows).sum(0) if rows else 0.0
        case _:
            return 0.0
