"""A graph as one HTML page that opens anywhere: style, code and data inside it, nothing fetched.

Data enters as JSON in a script element of its own, with every character escaped that could end it; the page's code puts
it into the document as text alone, so that no token of a prompt can become markup.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from stage_trace.certificate import MEASURED, Certificate
from stage_trace.graph import Edge, Graph
from stage_trace.heads import Split
from stage_trace.known import Known
from stage_trace.nodes import Kind, Node
from stage_trace.session import Session
from stage_trace.spliced import Spliced
from stage_trace.vocabulary import Words

ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


MOST_EDGES = 50_000
MOST_CARDS = 200
"""Of a page: a browser draws so many, and the file stays below 3 MB."""
LEAST_ATTENDED = 0.01
"""Share of a pattern below which a position is not told."""


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows of a graph."""

    graph: Graph
    document: dict[str, Any]
    """What ``graph.json`` holds, which the page gives back with a reader's groups."""
    certificate: Certificate | None
    words: Words | None
    known: Known
    heads: Split
    spliced: Spliced | None = None

    def html(self) -> str:
        """The whole page."""
        return self_contained("Attribution graph", "page.html", ("pins.js", "page.js"), _data(self))


def self_contained(title: str, body: str, scripts: Sequence[str], data: Any) -> str:
    """A page with style, code and `data` inside it; `body` and `scripts` are files of the assets."""
    assets = files("stage_trace") / "assets"

    def read(file: str) -> str:
        return (assets / file).read_text(encoding="utf-8")

    parts = {"title": title, "css": read("page.css"), "body": read(body), "data": in_script(data)}
    return read("frame.html") % (parts | {"js": "".join(map(read, ("common.js", *scripts)))})


def in_script(value: Any) -> str:
    """JSON that may stand in a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _data(shown: Page) -> dict[str, Any]:
    graph, known, certificate = shown.graph, shown.known, shown.certificate
    number_of = {node.id: number for number, node in enumerate(graph.nodes)}
    edges = [edge for edge in graph.edges if edge.source.id in number_of and edge.target.id in number_of]
    features = [node for node in graph.nodes if node.kind is Kind.feature]
    features.sort(key=lambda node: -(node.influence or 0.0))
    cards = {_card_name(node): known.card(node) for node in features[:MOST_CARDS]}
    return {
        "prompt": graph.prompt.text,
        "pieces": graph.prompt.pieces,
        "fixed": graph.prompt.fixed,
        "layers": graph.columns.num_layers,
        "nodes": [_node(graph, node, shown.words, known) for node in graph.nodes],
        "cards": {name: card for name, card in cards.items() if card is not None},
        "links": [
            [
                number_of[edge.source.id],
                number_of[edge.target.id],
                edge.weight,
                *([found] if (found := shown.heads.get((edge.source.id, edge.target.id))) else []),
            ]
            for edge in strongest(edges, MOST_EDGES)
        ],
        "pinned": graph.pinned,
        "supernodes": graph.supernodes,
        "facts": _facts(graph, certificate, shown.spliced),
        "certificate": None if certificate is None else certificate.to_dict(),
        "certificate_text": None if certificate is None else _told(certificate),
        "spliced_text": None if shown.spliced is None else _replaced(shown.spliced, graph),
        "footer": _footer(graph),
        "document": {**shown.document, "links": []},  # the page has them already
    }


def strongest(edges: list[Edge], most: int) -> list[Edge]:
    """The edges that give their targets the largest shares, in their order."""
    if len(edges) <= most:
        return edges
    total: dict[str, float] = {}
    for edge in edges:
        total[edge.target.id] = total.get(edge.target.id, 0.0) + abs(edge.weight)
    order = sorted(range(len(edges)), key=lambda one: -abs(edges[one].weight) / total[edges[one].target.id])
    return [edges[one] for one in sorted(order[:most])]


def _card_name(node: Node) -> str:
    """What the cards of all nodes of a latent are called."""
    return node.id.rsplit("_", 1)[0]


def _node(graph: Graph, node: Node, words: Words | None, known: Known) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": node.id,
        "kind": node.kind.value,
        "site": node.site,
        "layer": node.layer,
        "position": node.position,
        "latent": node.number if node.kind is Kind.feature else None,
        "card": _card_name(node) if node.kind is Kind.feature else None,
        "label": node.label,
        "name": known.name(node),
        "text": node.text,
        "activation": node.activation,
        "probability": node.probability,
        "influence": node.influence,
    }
    if node.is_attention and node.kind is Kind.feature and graph.session is not None:
        made["attends"] = _attends(graph.session, node)
    if words is not None and graph.decode is not None and node.kind is Kind.feature:
        for name, held in (("promotes", words.promotes), ("suppresses", words.suppresses)):
            made[name] = [graph.decode([token]) for token in held[node.output, node.number]]
    return made


def _attends(session: Session, node: Node) -> list[tuple[int, float]]:
    """The positions that a Lorsa's latent attends to, and how much, the most first."""
    number = session.columns.outputs.index(node.output)
    patterns = session.replacement.stand_ins[number].latents.patterns
    assert patterns is not None
    shares = patterns.pattern_HTT[node.number // patterns.per_head, node.position].tolist()
    seen = [(position, float(f"{share:.3f}")) for position, share in enumerate(shares) if share >= LEAST_ATTENDED]
    return sorted(seen, key=lambda one: -one[1])


def _facts(graph: Graph, certificate: Certificate | None, spliced: Spliced | None) -> list[tuple[str, str, str]]:
    """(name, value, what it means) of the figures at the top."""
    strict, theirs = graph.scores["strict"], graph.scores["circuit-tracer"]
    facts = [
        (
            "Replacement",
            f"{strict.replacement:.2f}",
            f"of the influence goes back to tokens, not errors; {theirs.replacement:.2f} by circuit-tracer's rule",
        ),
        (
            "Completeness",
            f"{strict.completeness:.2f}",
            f"of nodes' inputs is no error; {theirs.completeness:.2f} by circuit-tracer's rule",
        ),
        ("Rows add up", f"{graph.worst_gap:.0e}", "worst gap between a row's sum and what it explains"),
    ]
    if spliced is not None:
        told = (
            f"nats KL at the end with all dictionaries spliced in; {spliced.kl:.2f} over the prompt, same token at"
            f" {spliced.agreeing} of {spliced.positions}"
        )
        facts.append(("Replacement model", f"{spliced.kl_last:.2f}", told))
    if certificate is not None:
        held, norms, free = (certificate.rank_correlation(mode) for mode in MEASURED)
        if held is not None and norms is not None and free is not None:
            told = (
                f"rank correlation of predicted and actual ablations; {norms:.2f} with norms alone held,"
                f" {free:.2f} with everything free"
            )
            facts.append(("Agrees with the model, attention and norms held", f"{held:.2f}", told))
    shown = sum(node.kind is Kind.feature for node in graph.nodes)
    drawn, edges = min(len(graph.edges), MOST_EDGES), len(graph.edges)
    of_all = f"{drawn:,} edges" if drawn == edges else f"the {drawn:,} strongest of {edges:,} edges"
    facts.append(("Shown", f"{shown:,} features", f"of {graph.columns.num_features:,}; {of_all}"))
    return facts


def _told(certificate: Certificate) -> str:
    said = (
        "The most influential features, each set to zero: what the graph's edges predict for the logit of "
        f"“{certificate.logit.text}”, against what the model does with attention patterns and norm factors held, with "
        "norm factors alone held, and with everything free to respond."
    )
    held, norms, free = (certificate.rank_correlation(mode) for mode in MEASURED)
    if held is None or norms is None or free is None:
        return f"{said} Too few features for a rank correlation."
    said += (
        f" Rank correlation {held:.2f} both held, {norms:.2f} norms held, {free:.2f} free. The model's own response"
        f" with norms held ranks against its free one by {certificate.ceiling() or 0.0:.2f}: no graph that holds norms"
        " can be expected to do much better."
    )
    influence = certificate.influence_correlation()
    if influence is None:
        return said
    return (
        f"{said} And which features matter at all: over the {len(certificate.divergences)} most influential, the rank"
        " correlation of a feature's influence with what its ablation does to the whole distribution of the next token"
        f" (KL, everything free) is {influence:.2f}."
    )


def _replaced(spliced: Spliced, graph: Graph) -> str:
    """What the replacement model makes of the prompt."""
    told = (
        "The replacement model has all dictionaries in their places at once, each encoding what those before it"
        " have made of the stream, without errors."
    )
    if graph.decode is not None:
        told += f" It says “{graph.decode([spliced.said])}” ({spliced.probability:.0%})."
    told += (
        f" KL {spliced.kl_last:.2f} nats there, {spliced.kl:.2f} over the prompt, and the same likeliest token at"
        f" {spliced.agreeing} of {spliced.positions} positions."
    )
    if spliced.loss is not None:
        told += f" Its loss on the prompt is {spliced.loss:.2f} nats, the model's {spliced.loss_of_model:.2f}."
    return told


def _footer(graph: Graph) -> str:
    share = graph.node_share
    shown = "" if share is None else f" Shown are the nodes that make up {share:.0%} of the influence."
    return (
        "An edge is what its source adds to a latent's pre-activation, or to a logit less the mean of all logits, with"
        " this prompt's attention patterns and norm factors held. All sources of a row, biases and fixed positions"
        f" too, add up to what it explains.{shown} Dictionaries: {', '.join(graph.names)}."
    )
