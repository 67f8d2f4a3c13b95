"""A cross-layer transcoder of the bundled model against a transcoder per layer, at equal L0 over all layers.

FVU as logged at the end of training: each batch is scored before it is learnt from, and no token comes twice.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.basics.metrics_file import read_metrics

pytestmark = pytest.mark.slow

HARVEST = (
    "model=bundled corpus=stdlib hooks.layers=[0,1,2,3] hooks.sites=[mlp_in,mlp_out] packing.seq_len=512 "
    "corpus.contexts=1600 run_dir=."
)
TRAIN = (
    "run_dir=. sae=batchtopk sae.expansion=2 schedule.tokens=150_000 stream.batch_size=512 stream.lanes=16 "
    "stream.mix_contexts=2 logger.every=20 logger.progress=false logger.curves=false checkpoint.every=0 "
    "device.threads=1"
)
CLT = "variant=clt reads=layers.*.mlp_in writes=layers.*.mlp_out sae.k=32"
LAYERS = range(4)


def run(folder: Path, stage: str, words: str) -> None:
    done = subprocess.run([sys.executable, "-m", stage, *words.split()], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def mean_of_last(folder: Path, name: str) -> float:
    lines = read_metrics(folder)[-3:]
    return sum(line[name] for line in lines) / len(lines)


def test_no_worse_than_the_set_on_three_of_four_targets(tmp_path: Path) -> None:
    """256 latents to a layer; tied ones run too, and learn."""
    run(tmp_path, "stage_harvest", HARVEST)
    run(tmp_path, "stage_train", f"{TRAIN} {CLT} sae_name=clt")
    for tying in ("per_source", "per_target"):
        run(tmp_path, "stage_train", f"{TRAIN} {CLT} sae_name={tying} variant.tying={tying}")
        first, *_, last = read_metrics(tmp_path / tying)
        assert last["fvu"] < 0.9 * first["fvu"]
    better = 0
    for layer in LAYERS:
        sites = f"reads=layers.{layer}.mlp_in writes=layers.{layer}.mlp_out"
        run(tmp_path, "stage_train", f"{TRAIN} variant=transcoder {sites} sae.k=8 sae_name=layer_{layer}")
        alone = mean_of_last(tmp_path / f"layer_{layer}", "fvu")
        better += mean_of_last(tmp_path / "clt", f"fvu/layers.{layer}.mlp_out") <= alone
    assert mean_of_last(tmp_path / "clt", "l0") == pytest.approx(32, abs=0.01)
    assert better >= 3
