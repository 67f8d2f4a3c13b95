"""An attribution graph: nodes, the rows that connect them, and what can be asked of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from stage_trace.influence import Kept, Scores, Wiring, cumulative, influence, prune, scores
from stage_trace.leaves import Columns
from stage_trace.nodes import Kind, Node, check_unique
from stage_trace.session import Session


class Edge(NamedTuple):
    """What one node gives to another, in the units of the target: a latent's pre-activation, or a logit."""

    source: Node
    target: Node
    weight: float


@dataclass(frozen=True)
class Prompt:
    """What the graph is of."""

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """The tokens as text, one by one."""
    fixed: tuple[int, ...]
    """Positions that no dictionary was taught."""


@dataclass(frozen=True)
class Graph:
    """Rows are targets (features, then logits), columns sources; a pruned graph shows some of both.

    Rows are never cut: a pruned graph's hidden nodes still count in sums, scores and interventions.
    """

    prompt: Prompt
    rows_RS: Tensor
    wiring: Wiring
    columns: Columns
    sources: tuple[Node, ...]
    """One per column."""
    logits: tuple[Node, ...]
    worst_gap: float
    """Largest difference between a row's sum and what it explains, relative to the larger of that and its largest
    entry."""
    session: Session | None = None
    """What interventions run on; None for a graph that was read from a file."""
    decode: Callable[[list[int]], str] | None = None
    """The tokenizer's, for words that the page shows."""
    kept: Kept | None = None
    """What is shown; None: all."""
    node_share: float | None = None
    """What `kept` was pruned to."""
    names: tuple[str, ...] = ()
    """Of the dictionaries."""
    pinned: tuple[str, ...] = ()
    """Ids of nodes that a reader has marked."""
    supernodes: tuple[tuple[str, ...], ...] = ()
    """Groups of nodes, each a name and then ids."""

    def __post_init__(self) -> None:
        """Raises ValueError for two nodes of one id."""
        check_unique([*self.sources, *self.logits])

    @cached_property
    def targets(self) -> tuple[Node, ...]:
        """One per row."""
        features = [self.sources[column] for column in self.wiring.row_column_R.tolist() if column >= 0]
        return (*features, *self.logits)

    @cached_property
    def nodes(self) -> list[Node]:
        """Those that are shown: sources in column order, then logits."""
        shown = self.sources
        if self.kept is not None:
            # An error or bias that no edge leaves says nothing; tokens stay, as the prompt is read along them.
            kept = self.kept.nodes_S.tolist()
            shown = tuple(node for node, is_kept in zip(self.sources, kept, strict=True) if is_kept)
        return [*shown, *self.logits]

    @cached_property
    def edges(self) -> list[Edge]:
        """Those that are shown and not zero, row by row."""
        mask_RS = self.rows_RS != 0 if self.kept is None else self.kept.edges_RS
        rows, columns = torch.nonzero(mask_RS, as_tuple=True)
        weights = self.rows_RS[rows, columns].tolist()
        return [
            Edge(self.sources[column], self.targets[row], weight)
            for row, column, weight in zip(rows.tolist(), columns.tolist(), weights, strict=True)
        ]

    def prune(self, node_share: float = 0.8, edge_share: float = 0.98) -> Self:
        """The part that makes up these shares of the influence; raises GranaryError for shares outside 0 to 1."""
        for name, share in (("nodes", node_share), ("edges", edge_share)):
            if not 0 <= share <= 1:
                raise GranaryError(f"prune.{name}={share}: a share of the influence lies between 0 and 1")
        kept = prune(self.rows_RS, self.wiring, node_share, edge_share)
        return replace(self, kept=kept, node_share=node_share)

    @property
    def scan(self) -> str:
        """A name for the set of dictionaries, the same wherever the same ones are given."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """``strict``: biases and fixed positions count as errors; ``circuit-tracer``: they are left out."""
        extra_S = torch.zeros(self.columns.total, dtype=torch.bool)
        extra_S[self.columns.fixed_outputs] = True
        extra_S[self.columns.biases] = True
        errors_S = torch.zeros_like(extra_S)
        errors_S[self.columns.errors] = True
        return {
            "strict": scores(self.rows_RS, self.wiring, errors_S | extra_S),
            "circuit-tracer": scores(self.rows_RS, self.wiring, errors_S, extra_S),
        }

    def subgraph_scores(self, nodes: Sequence[str]) -> Scores:
        """Scores with every feature that is not among `nodes` (ids) counted as error: a chosen part of the graph."""
        chosen = set(nodes)
        unknown = chosen - {node.id for node in (*self.sources, *self.logits)}
        if unknown:
            raise GranaryError(f"the graph has no node {min(unknown)}")
        is_error_S = torch.tensor([node.kind is not Kind.token and node.id not in chosen for node in self.sources])
        is_error_S |= torch.tensor([node.kind not in (Kind.token, Kind.feature) for node in self.sources])
        return scores(self.rows_RS, self.wiring, is_error_S)

    def need_session(self) -> Session:
        """What the model is run on again with; raises GranaryError for a graph that was read from a file."""
        if self.session is None:
            raise GranaryError("this graph was read from a file: trace the prompt again to run its model")
        return self.session

    def node(self, identifier: str) -> Node:
        """Return the node of an id. Raises GranaryError for one that there is not."""
        for node in (*self.sources, *self.logits):
            if node.id == identifier:
                return node
        raise GranaryError(f"the graph has no node {identifier}")


def make_nodes(session: Session, chosen: Tensor, columns: Columns, pieces: Sequence[str]) -> list[Node]:
    """One node per column."""
    latents = [one.latents for one in session.replacement.stand_ins]
    position = torch.cat([one.position_N for one in latents])
    latent = torch.cat([one.latent_N for one in latents])
    value = torch.cat([one.value_N for one in latents])
    of_output = torch.cat([torch.full_like(one.position_N, number) for number, one in enumerate(latents)])
    chosen = chosen.to(position.device)
    described = zip(*(x[chosen].tolist() for x in (of_output, position, latent, value)), strict=True)
    outputs, depth, T = columns.outputs, columns.num_layers, columns.num_positions
    nodes = [
        Node(Kind.feature, outputs[which].layer, at, number, activation, site=outputs[which].site)
        for which, at, number, activation in described
    ]
    nodes += [Node(Kind.error, one.layer, at, -1, site=one.site) for one in outputs for at in range(T)]
    nodes += [Node(Kind.fixed, one.layer, at, -1, site=one.site) for one in outputs for at in columns.fixed]
    nodes += [Node(Kind.bias, layer, 0, -1) for layer in range(depth + 1)]
    ids = session.tokens_T.tolist()
    nodes += [Node(Kind.token, -1, at, ids[at], text=pieces[at]) for at in range(T)]
    return nodes


def with_influence(nodes: Sequence[Node], rows_RS: Tensor, wiring: Wiring) -> tuple[Node, ...]:
    """The nodes with their influence and its cumulative share."""
    found_S = influence(rows_RS, wiring)
    reached = cumulative(found_S).tolist()
    own = (found_S / found_S.sum().clamp_min(1e-30)).tolist()
    return tuple(
        replace(node, influence=share, cumulative=total) for node, share, total in zip(nodes, own, reached, strict=True)
    )
