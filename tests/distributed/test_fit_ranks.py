"""Fitting in two processes, each with a model and rows of its own: one SAE, from the rows of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT

pytestmark = pytest.mark.slow

WORKER = ROOT / "tests" / "distributed" / "fit_worker.py"
FIXED = ["stream.batch_size=32", "logger.progress=false", "checkpoint.every=0", "device.name=cpu", "device.threads=1"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_learn_one_sae(tmp_path: Path, layout: str) -> None:
    command = [sys.executable, "-m", "shared.launch.torchrun", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path), f"parallel={layout}", *FIXED],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["tokens"] == 6400
    assert first["metrics"]["fvu"] < 0.1
