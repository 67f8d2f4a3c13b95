"""The peers' side of the comparison of trainers: a run that is killed goes on to the very same dictionary."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("dictionary_learning", "sae_lens", "sparsify"):
    pytest.importorskip(package, reason=f"{package} is not in this environment: make test-peers")

pytestmark = pytest.mark.peers

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality_peers.py"
STEPS, BATCH, D_MODEL = 60, 32, 8


@pytest.mark.parametrize("provider", ["sparsify-auxk-early", "dictionary-learning", "sae-lens"])
def test_a_killed_run_ends_as_one_that_was_not(provider: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = {}
    for part, tokens in {"train": STEPS * BATCH, "test": 256, "validation": 256}.items():
        files[part] = str(tmp_path / f"{part}.npy")
        np.save(files[part], rng.laplace(size=(tokens, D_MODEL)).astype(np.float32))
    job = {
        "kind": "sae", "provider": provider, "lr": 3e-3, "warmup": 0.2, "decay": 0.2, "seed": 1, "threads": 1, "k": 4,
        "d_latent": 64, "batch_size": BATCH, "train": [files["train"]] * 2,
        "scored": {part: [files[part]] * 2 for part in ("test", "validation")},
    }  # fmt: skip
    whole = finished(started(tmp_path / "whole.job", job), tmp_path / "whole.out")
    process = started(tmp_path / "killed.job", job | {"save_seconds": 0.0})
    saved = tmp_path / "killed.saved"
    while not saved.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed.out").exists()
    again = finished(started(tmp_path / "killed.job", job | {"save_seconds": 0.0}), tmp_path / "killed.out")
    assert again == whole
    assert not saved.exists()


def started(path: Path, job: dict[str, Any]) -> subprocess.Popen[bytes]:
    path.write_text(json.dumps(job | {"out": str(path.with_suffix(".out"))}))
    return subprocess.Popen([sys.executable, str(SCRIPT), str(path)])


def finished(process: subprocess.Popen[bytes], out: Path) -> dict[str, float]:
    """Its result, but for the time that it took."""
    assert process.wait() == 0
    found = json.loads(out.read_text())
    assert found.pop("seconds") > 0
    return dict(found)
