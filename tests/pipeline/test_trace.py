"""``granary trace`` as a user runs it: files and scores, a plan before anything is loaded, and clear refusals."""

import json
import shutil
from pathlib import Path

import pytest

from shared.latents.global_weights import GlobalWeights
from shared.lm import model_identity
from tests.cli import ForkServer
from tests.tracing import bundled_lorsa, bundled_transcoder

TEXT = "text=def f(x):\n    return [x, 'y', {1: 2}]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a transcoder of each layer but the last."""
    folder = tmp_path_factory.mktemp("runs") / "tc"
    for layer in range(3):
        provenance = {"model": model_identity("bundled")}
        bundled_transcoder(layer).save_pretrained(folder / f"layer{layer}", provenance)
    bundled_lorsa(1).save_pretrained(folder.parent / "lorsa", {"model": model_identity("bundled")})
    return folder


@pytest.fixture(scope="module")
def lorsa(run: Path) -> Path:
    """Of the attention of layer 1, in a folder beside it."""
    return run.parent / "lorsa"


def test_a_text_becomes_files_and_scores(stages: ForkServer, run: Path, lorsa: Path, tmp_path: Path) -> None:
    done = stages.run(
        "stage_trace", str(run), str(lorsa), TEXT, f"out_dir={tmp_path}", "ablations=3", "ranked=5", "device.threads=1"
    )
    assert done.code == 0, done.stderr
    said = done.stdout + done.stderr
    for part in (
        "every one adds up to",
        "replacement",
        "completeness",
        "spliced      with",
        "certificate",
        "influence",
        "graph.html",
    ):
        assert part in said
    assert "no transcoder stands in for layers 3: their MLPs are all error" in said
    assert "a lorsa stands in for the attention of layers 1" in said
    document = json.loads((tmp_path / "graph.json").read_text())
    assert {"lorsa error", "cross layer transcoder"} < {node["feature_type"] for node in document["nodes"]}
    assert document["metadata"]["prompt"] == TEXT.removeprefix("text=")
    assert len(document["nodes"]) > 10


def test_f46_a_dry_run_plans_before_anything_is_loaded(
    stages: ForkServer, run: Path, lorsa: Path, tmp_path: Path
) -> None:
    """It needs no more than configurations and file headers; nothing is written beside Hydra's records."""
    out = tmp_path / "out"
    done = stages.run("stage_trace", f"{run}/layer*", str(lorsa), TEXT, f"out_dir={out}", "dry_run=true")
    assert done.code == 0, done.stderr
    said = done.stdout + done.stderr
    assert "at the peak (model 5.2 MB" in said
    assert "graph " not in said
    assert not (out / "graph.json").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{run}"], 'give text="..."'),
        (["{run}", TEXT, "prune.nodes=1.5"], "prune.nodes=1.5: a share lies between 0 and 1"),
        (["{run}", TEXT, "batch=0"], "batch=0: must be at least 1"),
        (["{run}/layer9", TEXT], "layer9"),
        (["{run}", TEXT, "enginee=sweep"], "did you mean 'engine'"),
    ],
)
def test_wrong_input_is_one_line(
    stages: ForkServer, run: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    given = [one.replace("{run}", str(run)) for one in arguments]
    done = stages.run("stage_trace", *given, f"out_dir={tmp_path}")
    assert told in done.error
    assert not (tmp_path / "graph.json").exists()


def test_weights_of_a_harvested_store(stages: ForkServer, run: Path, lorsa: Path, tmp_path: Path) -> None:
    """Beside the dictionaries, where a page of them looks; wrong input is one line, and nothing is written."""
    here = stages.at(tmp_path)
    sites = ["hooks.layers=[0,1,2]", "hooks.sites=[mlp_in]"]
    done = here.run("stage_harvest", "debug=tiny_harvest", "name=mlps", *sites)
    assert done.code == 0, done.stderr
    shutil.copytree(run, tmp_path / "tc")
    done = here.run("granary", "trace", "weights", "tc", "--store", "runs/mlps/store", "--tokens", "400")
    assert done.code == 0, done.stderr
    assert "memory    about" in done.stderr
    weights = GlobalWeights.open(tmp_path / "tc/weights")
    assert f"{weights.num_latents:,} latents" in done.stdout
    assert any(weights.sources(1, latent) for latent in range(96))
    assert (tmp_path / "tc/weights/weights.html").is_file()
    done = here.run("granary", "trace", "weights", "tc", str(lorsa), "--store", "runs/mlps/store", "--out", "other")
    assert "stands in for attention, whose paths are not in global weights: leave it out" in done.error
    done = here.run("granary", "trace", "weights", "tc", "--store", "nowhere", "--out", "other")
    assert "nowhere" in done.error
    assert not (tmp_path / "other").exists()
