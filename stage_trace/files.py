"""What a graph leaves on disk: ``graph.json`` in the field's schema, its index, and one page that opens anywhere.

The JSON is what circuit-tracer 0.5.0 writes and Neuronpedia reads: fixed positions and biases, which they do not know,
are nodes of the type of errors, told apart by ``clerp`` and ``granary_kind``; a Lorsa's nodes have the types that
Neuronpedia has for them, which circuit-tracer's viewer draws as features and as errors. Equal graphs give equal bytes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.basics.documents import read_json
from shared.basics.errors import GranaryError
from shared.basics.files import write_together
from stage_trace.certificate import Certificate
from stage_trace.graph import Edge, Graph
from stage_trace.heads import Split, split_edges
from stage_trace.known import Known
from stage_trace.nodes import Kind, Node, cantor
from stage_trace.page import Page
from stage_trace.spliced import Spliced
from stage_trace.vocabulary import Words

SCHEMA_VERSION = 1
FEATURE_TYPES = {
    Kind.feature: "cross layer transcoder",
    Kind.error: "mlp reconstruction error",
    Kind.fixed: "mlp reconstruction error",
    Kind.bias: "mlp reconstruction error",
    Kind.token: "embedding",
    Kind.logit: "logit",
}
ATTENTION_TYPES = {Kind.feature: "lorsa", Kind.error: "lorsa error", Kind.fixed: "lorsa error"}
"""Of nodes of a Lorsa."""


def save(
    graph: Graph,
    folder: Path,
    certificate: Certificate | None = None,
    known: Known | None = None,
    spliced: Spliced | None = None,
) -> list[Path]:
    """Write all files of `graph` into `folder`; they take their places together. Returns where they are.

    Pinned nodes and supernodes of a graph.json of the same prompt that lies there, which a reader has saved from the
    page, are kept as far as their nodes are there.
    """
    known = known or Known({})
    graph, heads = with_marks(graph, folder / "graph.json"), split_edges(graph)
    document = to_document(graph, "graph", known.name, heads)
    words = None if graph.session is None else Words.of(graph.session, graph.nodes)
    files = {
        "graph.json": f"{dumps(document)}\n",
        "graph-metadata.json": f"{dumps({'graphs': [document['metadata']]})}\n",
        "graph.html": Page(graph, document, certificate, words, known, heads, spliced).html(),
    }
    write_together(folder, files)
    return [folder / name for name in files]


def with_marks(graph: Graph, path: Path) -> Graph:
    """`graph` with the pinned nodes and supernodes of the file at `path`, where that is a graph of the same prompt."""
    try:
        held = read_json(path)
        is_same = held["metadata"]["prompt_tokens"] == list(graph.prompt.pieces)
        pinned, groups = held["qParams"]["pinnedIds"], held["qParams"]["supernodes"]
        if not is_same or not all(isinstance(one, str) for one in [*pinned, *(part for one in groups for part in one)]):
            return graph
    except (GranaryError, KeyError, TypeError):
        return graph  # there is none, or it is no graph of ours
    shown = {node.id for node in graph.nodes}
    kept = ((name, *(one for one in ids if one in shown)) for name, *ids in groups)
    supernodes = tuple(one for one in (*graph.supernodes, *kept) if len(one) > 1)
    marked = dict.fromkeys([*graph.pinned, *(one for one in pinned if one in shown)])
    return replace(graph, pinned=tuple(marked), supernodes=tuple(dict.fromkeys(supernodes)))


def to_document(
    graph: Graph, slug: str, name: Callable[[Node], str] = lambda _: "", heads: Split | None = None
) -> dict[str, Any]:
    """The graph as plain JSON types; of what a pruned graph shows, tokens and logits included.

    `name` gives what a feature is called, empty where it has no name; `heads` which attention heads carry an edge, of
    which links get ``granary_heads``: [layer, head, weight] each.
    """
    heads = heads or {}
    shown = {node.id for node in graph.nodes}
    return {
        "metadata": {
            "slug": slug,
            "scan": graph.scan,
            "transcoder_list": list(graph.names),
            "prompt_tokens": list(graph.prompt.pieces),
            "prompt": graph.prompt.text,
            "node_threshold": graph.node_share,
            "schema_version": SCHEMA_VERSION,
        },
        "qParams": {
            "pinnedIds": list(graph.pinned),
            "supernodes": [list(one) for one in graph.supernodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node(node, name(node), graph.columns.num_layers) for node in graph.nodes],
        "links": [
            _link(edge, heads.get((edge.source.id, edge.target.id)))
            for edge in graph.edges
            if edge.source.id in shown and edge.target.id in shown
        ],
    }


def _link(edge: Edge, heads: Sequence[tuple[int, int, float]] | None) -> dict[str, Any]:
    link: dict[str, Any] = {"source": edge.source.id, "target": edge.target.id, "weight": edge.weight}
    return link | {"granary_heads": [list(one) for one in heads]} if heads else link


def dumps(document: Any) -> str:
    """Canonical JSON: keys in the order given, no spaces, no NaN."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _node(node: Node, name: str, num_layers: int) -> dict[str, Any]:
    first_logit = node.kind is Kind.logit and node.is_first
    return {
        "node_id": node.id,
        "feature": _feature(node, num_layers),
        "layer": "E" if node.kind is Kind.token else str(node.layer),
        "ctx_idx": node.position,
        "feature_type": (ATTENTION_TYPES if node.is_attention else FEATURE_TYPES)[node.kind],
        "token_prob": node.probability or 0.0,
        "is_target_logit": first_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": _js_id(node),
        "clerp": _clerp(node, name),
        "influence": node.cumulative,
        "activation": node.activation,
        "granary_kind": node.kind.value,
    }


def _clerp(node: Node, name: str) -> str:
    """What a viewer writes beside a node; it has its own words for tokens and a transcoder's features and errors."""
    has_own = node.kind in (Kind.feature, Kind.error, Kind.token) and not node.is_attention
    return name if has_own else name or node.label


def _feature(node: Node, num_layers: int) -> int:
    """A number that no two features share: attention counts as further layers behind the model's own."""
    match node.kind:
        case Kind.feature:
            return cantor(node.layer + num_layers * node.is_attention, node.number)
        case Kind.token:
            return node.position
        case Kind.logit:
            return node.number
        case _:
            return -1


def _js_id(node: Node) -> str:
    match node.kind:
        case Kind.feature:
            return f"{node.id.rsplit('_', 1)[0]}-0"
        case Kind.token:
            return f"E_{node.number}-{node.position}"
        case Kind.logit:
            return f"L_{node.number}-{node.position}"
        case _:
            return f"{node.id}-0"
