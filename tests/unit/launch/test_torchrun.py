"""The multi-process launcher: a failing rank's line and status, and nothing of torchrun's own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shared.launch.torchrun import threads_per_rank

REPOSITORY = Path(__file__).resolve().parents[3]

FAILING = """
from shared.launch.outcome import fail
fail("the disk is full: free some")
"""

SUMMING = """
import torch
from shared.parallel import all_reduce_sum, broadcast_object, init_world, shutdown
world = init_world("cpu")
total = all_reduce_sum(torch.tensor([world.rank + 1]))
assert broadcast_object(world.rank) == 0
if world.is_main:
    print("sum", total.item(), "of", world.size)
shutdown()
"""


def launch(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "shared.launch.torchrun", "--standalone", "--nproc-per-node=2", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def test_ranks_find_one_another(tmp_path: Path) -> None:
    done = launch(SUMMING, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sum 3 of 2\n"


@pytest.mark.slow
def test_a_shared_fault_is_told_once(tmp_path: Path) -> None:
    done = launch(FAILING, tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the disk is full: free some\n"


@pytest.mark.slow
def test_machines_say_where_they_wait_for_one_another(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SUMMING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    rendezvous = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=test"]
    command = [sys.executable, "-m", "shared.launch.torchrun", *rendezvous, "--nproc-per-node=1", "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    machines = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        for _ in range(2)
    ]
    outputs = [machine.communicate(timeout=280) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "".join(out for out, _ in outputs) == "sum 3 of 2\n"
    assert all(f"waiting   for 2 machines to meet at {endpoint}\n" in err for _, err in outputs)


def test_cores_are_shared_among_ranks() -> None:
    cores = os.cpu_count() or 1
    assert threads_per_rank(["--nproc-per-node", "1", "-m", "x"]) == cores
    assert threads_per_rank([f"--nproc-per-node={2 * cores}"]) == 1
