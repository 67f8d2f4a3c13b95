"""A running Slurm, or a skip that says how to get one."""

import os
import shutil
import subprocess

import pytest


@pytest.fixture(scope="session", autouse=True)
def slurm() -> None:
    pytest.importorskip("submitit", reason="needs submitit: pip install 'granary-sae[slurm]'")
    if shutil.which("sbatch") is None or "SLURM_CONF" not in os.environ:
        pytest.skip("no Slurm here: `make test-cluster` installs one, starts it and runs these tests")
    state = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], capture_output=True, text=True)
    if state.returncode or "idle" not in state.stdout:
        pytest.skip(f"the Slurm of SLURM_CONF has no idle node: {state.stdout}{state.stderr}")
