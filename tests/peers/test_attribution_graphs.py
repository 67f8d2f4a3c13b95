"""Attribution graphs against circuit-tracer 0.5.0, which runs in an environment of its own: make test-peers.

It needs nnsight 0.6.0 and transformers 4, which this project does not work with: hence a process of its own, and files
between the two.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.bundled import MODEL_DIR
from shared.lm import model_identity
from shared.sae import Dictionary
from shared.sae.sets import convert_set
from stage_trace.attribution import AttributionGraph
from stage_trace.graph import Graph
from stage_trace.influence import influence, prune
from stage_trace.trace import TraceSettings, trace
from tests.tracing import bundled_lorsa, bundled_transcoder, make_clt

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / os.environ.get("VENV_TRACER", ".venv-tracer") / "bin" / "python"
if not PYTHON.exists():
    pytest.skip("circuit-tracer is not there: make test-peers", allow_module_level=True)

TEXT = "def read(self, path):\n    with open("
PROMPT = [0, 330, 1421, 12, 260, 402, 93, 12, 77]  # begins with BOS
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": ""}


@pytest.fixture(scope="module")
def side() -> Iterator[Callable[..., Any]]:
    """``side("parse", path)`` is what the other side answers: one process for all, which imports its packages once."""
    script = Path(__file__).with_name("circuit_tracer_side.py")
    with subprocess.Popen(
        [str(PYTHON), str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **OFFLINE},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def ask(*command: object) -> Any:
            asked.write(json.dumps(list(map(str, command))) + "\n")
            asked.flush()
            answer = json.loads(answers.readline() or '{"error": "it has ended"}')
            assert "error" not in answer, answer["error"]
            return answer["value"]

        yield ask
        asked.close()


def export(dictionaries: list[Dictionary], folder: Path, where: Path) -> None:
    """A set, or a CLT, as circuit-tracer reads it."""
    provenance = {"model": model_identity("bundled")}
    for layer, one in enumerate(dictionaries):
        one.save_pretrained(where if len(dictionaries) == 1 else where / f"layer_{layer}", provenance)
    folder.parent.mkdir(parents=True)
    convert_set(where, folder, "circuit_tracer")


@pytest.fixture(scope="module")
def old_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with the tokenizer class that transformers 4 knows."""
    folder = tmp_path_factory.mktemp("model") / "bundled"
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def in_its_order(graph: Graph) -> torch.Tensor:
    """The square matrix of circuit-tracer's nodes: features, errors, tokens, logits; rows are targets."""
    columns, n = graph.columns, len(graph.logits)
    kept = torch.cat([torch.arange(columns.errors.stop), torch.arange(columns.tokens.start, columns.tokens.stop)])
    square = torch.zeros(len(kept) + n, len(kept) + n)
    square[: columns.num_features, : len(kept)] = graph.rows_RS[: columns.num_features, kept]
    square[-n:, : len(kept)] = graph.rows_RS[columns.num_features :, kept]
    return square


@pytest.mark.parametrize("kind", ["plain", "skip", "clt"])
def test_f51_its_adjacency_from_the_same_transcoders_is_ours(
    tmp_path: Path, old_model: Path, side: Callable[..., Any], kind: str
) -> None:
    """The prompt is given as ids, since it takes an id of 0 for no BOS."""
    made: list[Dictionary] = [bundled_transcoder(layer, skip=kind == "skip", threshold=0.8) for layer in range(4)]
    if kind == "clt":
        made = [make_clt(4, width=128, latents=64)]
    export(made, tmp_path / "cache" / "granary" / "set", tmp_path / "ours")
    side("attribute", old_model, tmp_path / "cache", "granary/set", json.dumps(PROMPT), tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs")
    graph = trace("bundled", made, PROMPT, settings=TraceSettings())
    features = [(node.layer, node.position, node.number) for node in graph.sources if node.activation is not None]
    assert len(features) > 30
    assert features == [tuple(one) for one in theirs["active"].tolist()]
    torch.testing.assert_close(
        torch.tensor([node.activation for node in graph.sources if node.activation is not None]),
        theirs["values"], rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    assert [node.number for node in graph.logits] == theirs["logits"].tolist()
    ours = in_its_order(graph)
    difference = (ours - theirs["adjacency"]).abs().max(1).values / ours.abs().max(1).values.clamp_min(1e-12)
    assert float(difference.max()) < 1e-3
    print(f"worst difference {float(difference.max()):.1e} of a row's maximum, {len(features)} features")  # noqa: T201


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    """Of random transcoders."""
    return trace("bundled", [bundled_transcoder(layer, threshold=0.8) for layer in range(4)], TEXT)


@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.5, 0.9), (0.95, 0.99), (0.0, 0.5)])
def test_f36_scores_and_masks_are_its_own_on_one_matrix(
    tmp_path: Path, graph: Graph, side: Callable[..., Any], node_share: float, edge_share: float
) -> None:
    square = in_its_order(graph)
    num_features, n = graph.columns.num_features, len(graph.logits)
    probabilities = torch.tensor([node.probability for node in graph.logits])
    save_file(
        {
            "adjacency": square,
            "tokens": torch.tensor(graph.prompt.ids),
            "logits": torch.arange(n),
            "probabilities": probabilities,
            "num_features": torch.tensor(num_features),
            "num_layers": torch.tensor(graph.columns.num_layers),
            "node_share": torch.tensor(node_share, dtype=torch.float64),
            "edge_share": torch.tensor(edge_share, dtype=torch.float64),
        },
        tmp_path / "matrix",
    )
    side("score", tmp_path / "matrix", tmp_path / "scores")
    theirs = load_file(tmp_path / "scores")
    ours = graph.scores["circuit-tracer"]
    torch.testing.assert_close(
        torch.tensor([ours.replacement, ours.completeness]), theirs["scores"], rtol=1e-5, atol=1e-5
    )
    # Its nodes alone, as rows and columns of ours.
    rows = torch.cat([square[:num_features], square[-n:]])[:, : len(square) - n]
    from dataclasses import replace

    may_drop = torch.ones(rows.shape[1], dtype=torch.bool)
    may_drop[-len(graph.prompt.ids) :] = False
    wires = replace(graph.wiring, may_drop_S=may_drop)
    torch.testing.assert_close(
        influence(rows, wires).float(), theirs["influence"][: len(square) - n], rtol=1e-4, atol=1e-6
    )
    kept = prune(rows, wires, node_share, edge_share)
    assert torch.equal(kept.nodes_S, theirs["nodes"][: len(square) - n])
    edges = torch.cat([theirs["edges"][:num_features], theirs["edges"][-n:]])[:, : len(square) - n]
    assert torch.equal(kept.edges_RS, edges)


@pytest.mark.parametrize("has_lorsa", [False, True])
def test_f40_its_models_and_its_server_read_our_files(
    tmp_path: Path, graph: AttributionGraph, side: Callable[..., Any], has_lorsa: bool
) -> None:
    if has_lorsa:
        made: list[Dictionary] = [bundled_transcoder(layer, threshold=0.8) for layer in range(4)]
        graph = trace("bundled", [*made, bundled_lorsa(1)], TEXT)
    graph.prune(0.95).save(tmp_path / "out")
    shown = json.loads((tmp_path / "out" / "graph.json").read_text())
    parsed = side("parse", tmp_path / "out" / "graph.json")
    assert ("lorsa" in {node["feature_type"] for node in shown["nodes"]}) == has_lorsa
    assert parsed == {"nodes": len(shown["nodes"]), "unique": len(shown["nodes"]), "links": len(shown["links"])}
    served = side("serve", tmp_path / "out", "graph")
    assert served == {"nodes": len(shown["nodes"]), "slugs": ["graph"]}
