"""A whole training step on tensors that hold no data: what it launches, that it never waits, what memory it takes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def counts(*arguments):
    """In a process of its own: the interpreter, which the other tests use, would run the kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/gpu_counts.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "moments"), [("topk", "float32"), pytest.param("transcoder", "bfloat16", marks=pytest.mark.slow)]
)
def test_a_step_never_waits_for_the_device_and_fits(kind, moments):
    steps = counts("--shapes", "a", "b", "--kind", kind, "--moments", moments)
    for step, most_gb in zip(steps, (3, 5 if kind == "topk" else 5.5), strict=True):
        assert step["syncs"] == []
        assert step["contiguous"]
        assert step["above_state_gb"] < most_gb
        # Both matrices by pairs, once for the norm and once for the update; the vectors by row_update.
        assert step["kernel_launches"]["_pair_norm"] == step["kernel_launches"]["_pair_update"] == 2
        assert "_row_grad" not in step["kernel_launches"]
        assert step["kernel_launches"]["_residual"] == step["kernel_launches"]["_residual_grad"] == 1


@pytest.mark.slow
def test_latents_that_are_all_dead_take_turns_instead_of_memory():
    """Of 262,144 latents of width 4,096; all of them at once would take 30 GB above weights and moments."""
    few, every = counts("--shapes", "b", "--quiet", "1000", "1")
    assert few["syncs"] == every["syncs"] == []
    assert few["above_state_gb"] < every["above_state_gb"] < 7.6


@pytest.mark.slow
def test_what_waits_is_seen():
    source = (
        "import torch; from shared.kernels.fake_cuda import DEVICE, FakeCuda\n"
        "with FakeCuda() as record:\n"
        "    x = torch.zeros(4, device=DEVICE)\n"
        "    x[torch.zeros(2, dtype=torch.int64, device=DEVICE)] = 1.0\n"
        "    torch.tensor([1.0, 2.0], device='cpu').to(DEVICE)\n"
        "    assert len(record.syncs) == 2, record.syncs\n"
        "    assert x.is_cuda\n"
        "    for wait in (lambda: int(x[0]), lambda: x.nonzero(), lambda: bool(x.any())):\n"
        "        try:\n"
        "            wait()\n"
        "        except (RuntimeError, NotImplementedError):\n"
        "            continue\n"
        "        raise SystemExit('not seen')\n"
        "assert not torch.zeros(1, device=DEVICE).is_cuda\n"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
