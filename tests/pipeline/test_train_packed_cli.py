"""A packed sweep as a user runs it: the same folders and weights as the sweep in turn, killed or not, on many ranks."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from shared.store import Store
from tests.cli import Child, ForkServer
from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm

SWEEP = [
    "-m", "sae.k=2,3", "sae.expansion=4,8", "stream.batch_size=16", "schedule.tokens=3_200", "checkpoint.every=40",
    "logger.every=10", "logger.progress=false", "logger.curves=false", "sae.dead_after_tokens=100", "stream.lanes=4",
    "device.threads=1",
]  # fmt: skip


class Sweeps:
    """Sweeps in a folder with a store."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        self.folder, self.server = folder, server.at(folder)

    def start(self, name: str, *overrides: str) -> Child:
        paths = [f"run_dir={self.folder / name}", f"store.url={self.folder / 'store'}"]
        return self.server.start("stage_train", *overrides, *paths, session=True)

    def done(self, name: str, *overrides: str) -> str:
        """What it wrote to stderr."""
        result = self.start(name, *overrides).finish()
        assert result.code == 0, result.stderr
        return result.stderr


@pytest.fixture(scope="module")
def sweeps(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Sweeps:
    """A folder with a store."""
    sweeps = Sweeps(tmp_path_factory.mktemp("packed"), stages)
    planted_store(sweeps.folder / "store")
    return sweeps


@pytest.fixture(scope="module")
def in_turn(sweeps: Sweeps) -> Path:
    """The sweep, one SAE after the other."""
    sweeps.done("turn", *SWEEP)
    return sweeps.folder / "turn"


def one_of(run: Path, name: str) -> Path:
    """The folder of one SAE of a sweep."""
    (found,) = (run / "sweep").glob(f"*{name},*")
    return found


def wait_for(process: Child, run: Path, lines: int) -> None:
    """Until one of the sweep's SAEs has logged so often; a sweep that does not get there is ended."""
    deadline = time.monotonic() + 280
    while not any(len(read_metrics(path.parent)) >= lines for path in (run / "sweep").glob("*/metrics.jsonl")):
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(process.errors)
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


@pytest.mark.slow  # tests/unit/train/test_many.py has each run as if alone, and what was stopped together
def test_killed_and_continued_it_equals_the_sweep_in_turn(sweeps: Sweeps, in_turn: Path) -> None:
    folder = sweeps.folder
    process = sweeps.start("packed", *SWEEP, "packed=true")
    wait_for(process, folder / "packed", lines=8)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not saes(folder / "packed")

    errors = sweeps.done("packed", *SWEEP, "packed=true")
    assert "continuing from step" in errors
    assert "read once for 4 SAEs" in errors
    assert_same_sweep(in_turn, folder / "packed")
    curves = [read_metrics(one_of(run, "expansion=8,k=3")) for run in (in_turn, folder / "packed")]
    assert [line["loss"] for line in curves[0]] == [line["loss"] for line in curves[1]]


@pytest.mark.slow  # tests/unit/train/test_many.py has each run as if alone, tests/distributed the layouts
@pytest.mark.parametrize("layout", ["ddp", "latent"])
def test_two_processes_share_every_sae(sweeps: Sweeps, in_turn: Path, layout: str) -> None:
    sweeps.done(layout, *SWEEP, "packed=true", "nproc=2", f"parallel={layout}")
    assert_same_sweep(in_turn, sweeps.folder / layout, bound=SAME_RUN)


@pytest.mark.slow  # tests/unit/train/test_many.py stops runs that learn together and continues them
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_saves_all_of_them(sweeps: Sweeps, nproc: int) -> None:
    name = f"signalled{nproc}"
    process = sweeps.start(name, *SWEEP, "packed=true", f"nproc={nproc}", "schedule.tokens=20_000_000")
    wait_for(process, sweeps.folder / name, lines=1)
    process.send_signal(signal.SIGTERM)
    result = process.finish()
    assert result.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(list((sweeps.folder / name / "sweep").glob("*/checkpoints/latest"))) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["packed=true"], "packed=true trains the runs of a sweep together"),
        pytest.param(
            ["-m", "packed=true", "seed=0,1"],
            "seeds [0, 1] ask for several: give stream.seed=0",
            marks=pytest.mark.slow,  # the same without the command line is in tests/unit/train/test_many.py
        ),
        pytest.param(
            ["-m", "packed=true", "sae.k=2,900"], "sae.k=900 is more than the 192 latents", marks=pytest.mark.slow
        ),
    ],
)
def test_wrong_uses_are_one_line(sweeps: Sweeps, overrides: list[str], message: str) -> None:
    result = sweeps.start("wrong", *overrides, "schedule.tokens=320", "stream.batch_size=16").finish()
    assert result.code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert message in line
    assert "Traceback" not in result.stderr


def test_a_list_that_is_none_is_one_line(sweeps: Sweeps) -> None:
    (sweeps.folder / "wrong.yaml").write_text("- sae: {k: 3, kk: 4}\n")
    for file, message in (("absent.yaml", "absent.yaml is not there"), ("wrong.yaml", "configuration key 'sae.kk'")):
        assert message in sweeps.server.run("stage_train.packed", file).error
