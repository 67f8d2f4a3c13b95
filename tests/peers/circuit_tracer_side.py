"""What circuit-tracer makes of a folder, run by the Python of an environment that has it: see test_attribution_graphs.

Commands are read from stdin, each a line of JSON, and answered by a line of JSON:
["attribute", MODEL, CACHE, NAME, IDS, OUT]     its graph -> safetensors
["score", MATRIX, OUT]                          its scores and masks of a matrix
["parse", GRAPH_JSON]                           its models of a graph's JSON
["serve", FOLDER, SLUG]                         its server, over HTTP
"""

import json
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def attribute(model: str, cache: str, name: str, ids: str, out: str) -> None:
    os.environ["CIRCUIT_TRACER_CACHE_DIR"] = cache
    from circuit_tracer import ReplacementModel
    from circuit_tracer.attribution.attribute import attribute as run

    loaded = ReplacementModel.from_pretrained(
        model, name, backend="nnsight", device=torch.device("cpu"), dtype=torch.float32
    )
    graph = run(torch.tensor(json.loads(ids)), loaded, batch_size=64, verbose=False)
    save_file(
        {
            "adjacency": graph.adjacency_matrix.contiguous(),
            "active": graph.active_features.contiguous(),
            "values": graph.activation_values.contiguous(),
            "logits": graph.logit_token_ids,
            "probabilities": graph.logit_probabilities.contiguous(),
        },
        out,
    )


def score(matrix: str, out: str) -> None:
    from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph

    held = load_file(matrix)
    graph = types.SimpleNamespace(
        adjacency_matrix=held["adjacency"],
        input_tokens=held["tokens"],
        logit_targets=held["logits"].tolist(),
        logit_probabilities=held["probabilities"],
        selected_features=torch.arange(int(held["num_features"])),
        cfg=types.SimpleNamespace(n_layers=int(held["num_layers"])),
    )
    replacement, completeness = compute_graph_scores(graph)
    weights = torch.zeros(len(held["adjacency"]))
    weights[-len(held["logits"]) :] = held["probabilities"]
    pruned = prune_graph(graph, float(held["node_share"]), float(held["edge_share"]))
    save_file(
        {
            "scores": torch.tensor([replacement, completeness]),
            "influence": compute_node_influence(held["adjacency"], weights),
            "nodes": pruned.node_mask,
            "edges": pruned.edge_mask,
            "cumulative": pruned.cumulative_scores,
        },
        out,
    )


def parse(graph: str) -> dict[str, Any]:
    from circuit_tracer.frontend.graph_models import Model

    held = Model.model_validate_json(Path(graph).read_text())
    ids = {node.node_id for node in held.nodes}
    return {"nodes": len(held.nodes), "unique": len(ids), "links": len(held.links)}


def serve(folder: str, slug: str) -> dict[str, Any]:
    import urllib.request

    from circuit_tracer.frontend.local_server import serve as start

    server = start(folder, port=0)
    try:
        base = f"http://localhost:{server.httpd.server_address[1]}"
        with urllib.request.urlopen(f"{base}/graph_data/{slug}.json") as answer:
            held = json.loads(answer.read())
        with urllib.request.urlopen(f"{base}/data/graph-metadata.json") as answer:
            listed = json.loads(answer.read())
        return {"nodes": len(held["nodes"]), "slugs": [one["slug"] for one in listed["graphs"]]}
    finally:
        server.stop()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints is no answer
    commands = {"attribute": attribute, "score": score, "parse": parse, "serve": serve}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": commands[name](*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
