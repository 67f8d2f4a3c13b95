"""What a graph leaves on disk: ``graph.json`` in the field's schema, its index, and one page that opens anywhere.

The JSON is what circuit-tracer 0.5.0 writes and Neuronpedia reads: fixed positions and biases, which they do not know,
are nodes of the type of errors, told apart by ``clerp`` and ``granary_kind``. Equal graphs give equal bytes.
"""

import json
from pathlib import Path
from typing import Any

from shared.basics.files import write_together
from stage_trace.certificate import Certificate
from stage_trace.graph import Graph
from stage_trace.nodes import Kind, Node, cantor
from stage_trace.page import page
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


def save(graph: Graph, folder: Path, certificate: Certificate | None = None) -> list[Path]:
    """Write all files of `graph` into `folder`; they take their places together. Returns where they are."""
    document = to_document(graph, slug="graph")
    words = None if graph.session is None else Words.of(graph.session, graph.nodes)
    files = {
        "graph.json": f"{dumps(document)}\n",
        "graph-metadata.json": f"{dumps({'graphs': [document['metadata']]})}\n",
        "graph.html": page(graph, document, certificate, words),
    }
    write_together(folder, files)
    return [folder / name for name in files]


def to_document(graph: Graph, slug: str) -> dict[str, Any]:
    """The graph as plain JSON types; of what a pruned graph shows, tokens and logits included."""
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
        "nodes": [_node(node, number, len(graph.prompt.ids)) for number, node in enumerate(graph.nodes)],
        "links": [
            {"source": edge.source.id, "target": edge.target.id, "weight": edge.weight}
            for edge in graph.edges
            if edge.source.id in shown and edge.target.id in shown
        ],
    }


def dumps(document: Any) -> str:
    """Canonical JSON: keys in the order given, no spaces, no NaN."""
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _node(node: Node, number: int, length: int) -> dict[str, Any]:
    first_logit = node.kind is Kind.logit and node.is_first
    return {
        "node_id": node.id,
        "feature": _feature(node),
        "layer": "E" if node.kind is Kind.token else str(node.layer),
        "ctx_idx": node.position,
        "feature_type": FEATURE_TYPES[node.kind],
        "token_prob": node.probability or 0.0,
        "is_target_logit": first_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": _js_id(node),
        "clerp": "" if node.kind in (Kind.feature, Kind.error, Kind.token) else node.label,
        "influence": node.cumulative,
        "activation": node.activation,
        "granary_kind": node.kind.value,
    }


def _feature(node: Node) -> int:
    match node.kind:
        case Kind.feature:
            return cantor(node.layer, node.number)
        case Kind.token:
            return node.position
        case Kind.logit:
            return node.number
        case _:
            return -1


def _js_id(node: Node) -> str:
    match node.kind:
        case Kind.feature:
            return f"{node.layer}_{node.number}-0"
        case Kind.token:
            return f"E_{node.number}-{node.position}"
        case Kind.logit:
            return f"L_{node.number}-{node.position}"
        case _:
            return f"{node.id}-0"
