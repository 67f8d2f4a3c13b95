"""A packed sweep as a user runs it: the same folders and weights as the sweep in turn, killed or not, on many ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from shared.store import Store
from tests.cli import REPOSITORY
from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm

SWEEP = [
    "-m", "sae.k=2,3", "sae.expansion=4,8", "stream.batch_size=16", "schedule.tokens=3_200", "checkpoint.every=40",
    "logger.every=10", "logger.progress=false", "logger.curves=false", "sae.dead_after_tokens=100", "stream.lanes=4",
    "device.threads=1",
]  # fmt: skip


def start(folder: Path, name: str, *overrides: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "stage_train", *overrides]
    return subprocess.Popen(
        [*command, f"run_dir={folder / name}", f"store.url={folder / 'store'}"],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    with process:
        try:
            _, errors = process.communicate(timeout=150)
        finally:
            process.kill()
    return process.returncode, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Path:
    """A store, and the sweep done in turn."""
    folder = tmp_path_factory.mktemp("packed")
    planted_store(folder / "store")
    status, errors = finish(start(folder, "turn", *SWEEP))
    assert status == 0, errors
    return folder


def one_of(run: Path, name: str) -> Path:
    """The folder of one SAE of a sweep."""
    (found,) = (run / "sweep").glob(f"*{name},*")
    return found


def wait_for(process: "subprocess.Popen[str]", run: Path, lines: int) -> None:
    """Until one of the sweep's SAEs has logged so often; a sweep that does not get there is ended."""
    deadline = time.monotonic() + 100
    while not any(len(read_metrics(path.parent)) >= lines for path in (run / "sweep").glob("*/metrics.jsonl")):
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(finish(process)[1])
        time.sleep(0.01)


def saes(run: Path) -> dict[tuple[int | None, int], dict[str, torch.Tensor]]:
    """Weights of a sweep's SAEs by k and width."""
    found = [SAE.from_pretrained(path.parent) for path in (run / "sweep").glob("*/config.json")]
    return {(sae.config.k, sae.config.d_latent): sae.state_dict() for sae in found}


def assert_same_sweep(one: Path, two: Path, bound: float = 0.0) -> None:
    first, second = saes(one), saes(two)
    assert len(first) == 4
    assert first.keys() == second.keys()
    for sae, tensors in first.items():
        for name, tensor in tensors.items():
            assert_close_in_norm(second[sae][name], tensor, bound, f"{name} after the same batches, {REORDERED}")


def test_killed_and_continued_it_equals_the_sweep_in_turn(folder: Path) -> None:
    process = start(folder, "packed", *SWEEP, "packed=true")
    wait_for(process, folder / "packed", lines=8)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not saes(folder / "packed")

    status, errors = finish(start(folder, "packed", *SWEEP, "packed=true"))
    assert status == 0, errors
    assert "continuing from step" in errors
    assert "read once for 4 SAEs" in errors
    assert_same_sweep(folder / "turn", folder / "packed")
    curves = [read_metrics(one_of(folder / name, "expansion=8,k=3")) for name in ("turn", "packed")]
    assert [line["loss"] for line in curves[0]] == [line["loss"] for line in curves[1]]


@pytest.mark.parametrize("layout", ["ddp", "latent"])
def test_two_processes_share_every_sae(folder: Path, layout: str) -> None:
    status, errors = finish(start(folder, layout, *SWEEP, "packed=true", "nproc=2", f"parallel={layout}"))
    assert status == 0, errors
    assert_same_sweep(folder / "turn", folder / layout, bound=SAME_RUN)


def test_a_signal_saves_all_of_them(folder: Path) -> None:
    process = start(folder, "signalled", *SWEEP, "packed=true", "nproc=2", "schedule.tokens=100_000_000")
    wait_for(process, folder / "signalled", lines=1)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
    assert len(list((folder / "signalled/sweep").glob("*/checkpoints/latest"))) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["packed=true"], "packed=true trains the runs of a sweep together"),
        (["-m", "packed=true", "seed=0,1"], "seeds [0, 1] ask for several: give stream.seed=0"),
        (["-m", "packed=true", "sae.k=2,900"], "sae.k=900 is more than the 192 latents"),
    ],
)
def test_wrong_uses_are_one_line(folder: Path, overrides: list[str], message: str) -> None:
    status, errors = finish(start(folder, "wrong", *overrides, "schedule.tokens=320", "stream.batch_size=16"))
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert message in line
    assert "Traceback" not in errors


def test_a_list_that_is_none_is_one_line(folder: Path) -> None:
    (folder / "wrong.yaml").write_text("- sae: {k: 3, kk: 4}\n")
    for file, message in (("absent.yaml", "absent.yaml is not there"), ("wrong.yaml", "configuration key 'sae.kk'")):
        done = subprocess.run(
            [sys.executable, "-m", "stage_train.packed", file],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert message in line
