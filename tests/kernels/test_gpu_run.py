"""The run on a GPU, rehearsed: every stage at tiny sizes, on a machine that lacks what the GPU machine lacks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ABSENT = ("hydra", "omegaconf", "zarr", "numcodecs", "crc32c", "obstore", "s3fs", "datasets", "antlr4", "submitit")
HIDE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def rehearse(tmp_path, *arguments):
    """(exit status, output, lines of results)."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "results"
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out), "--rehearse", "--budget", "3000", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, lines


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


DEAR = ["compile", "checks even", "train", "step a", "step cached", "auxk", "load", "staging", "probes", "tests"]


@pytest.mark.slow
@pytest.mark.parametrize("stages", [["machine", "checks ragged"], DEAR])
def test_every_stage_ends_well(tmp_path, stages):
    status, output, lines = rehearse(tmp_path, "--only", *stages)
    wrong = [line for line in lines if not line.get("ok", True)]
    assert status == 0, output + str(wrong)
    assert sorted(line["stage"] for line in lines if line["name"] == "stage") == sorted(stages)
    table = (tmp_path / "results" / "table.md").read_text()
    assert all(f"| {stage} | first | 0" in table for stage in stages)


@pytest.mark.slow
def test_a_stage_that_dies_is_tried_again_and_the_others_are_done(tmp_path):
    results = tmp_path / "results"
    (results / "registers.md").mkdir(parents=True)
    status, _, lines = rehearse(tmp_path, "--only", "compile", "machine")
    stages = [(line["stage"], line["attempt"], line["ok"]) for line in lines if line["name"] == "stage"]
    assert status == 1
    assert stages == [("machine", "first", True), ("compile", "first", False), ("compile", "blocking", False)]
    assert "IsADirectoryError" in next(line["end"] for line in lines if line["stage"] == "compile")
