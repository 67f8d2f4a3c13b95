"""Training as a user runs it: kills and signals in the middle, and one clear line for each wrong input."""

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from shared.store import Store
from tests.cli import Child, ForkServer, Result

TIMES = {"tokens_per_s", "wait_share"}


Start = Callable[..., Child]


@pytest.fixture(scope="module")
def start(stages: ForkServer, store: Path) -> Start:
    """Begin ``python -m stage_train`` with these overrides."""
    return partial(stages.at(store.parent).start, "stage_train", "logger.progress=false", "logger.curves=false")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Path:
    folder = tmp_path_factory.mktemp("train") / "store"
    planted_store(folder)
    return folder


@pytest.mark.slow
def test_killed_and_signalled_runs_end_with_the_same_weights(start: Start, store: Path) -> None:
    """SIGKILL once in mid-run, SIGUSR1 once, the same command each time: bit for bit an uninterrupted run."""
    common = [f"store.url={store}", "sae.k=3", "sae.expansion=8", "stream.batch_size=16", "schedule.tokens=24_000"]
    common += ["checkpoint.every=100", "logger.every=50", "sae.dead_after_tokens=500"]
    straight, broken = store.with_name("straight"), store.with_name("broken")
    uninterrupted = start(*common, f"run_dir={straight}", f"out_dir={straight}")

    command = [*common, f"run_dir={broken}", f"out_dir={broken}"]
    process = start(*command)
    wait_for(broken, process, step=150)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    process = start(*command)
    wait_for(broken, process, step=400)
    process.send_signal(signal.SIGUSR1)
    stopped = process.finish()
    assert stopped.code == 128 + signal.SIGUSR1, stopped.stderr
    assert "continuing from step" in stopped.stderr
    assert "stopped by SIGUSR1 after step" in stopped.stderr
    assert "the same command continues" in stopped.stderr
    assert not (broken / "sae.safetensors").exists()

    for process in (start(*command), uninterrupted):
        assert process.finish().code == 0, process.errors
    first, second = (SAE.from_pretrained(folder).state_dict() for folder in (straight, broken))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    lines = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]
        for folder in (straight, broken)
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) > 10


def wait_for(folder: Path, process: Child, step: int) -> None:
    deadline = time.monotonic() + 280
    while not any(line["step"] >= step for line in read_metrics(folder)):
        assert process.poll() is None, process.errors
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def faults(start: Start, store: Path) -> dict[str, Result]:
    """How one wrong command each ends, run side by side."""
    torn = store.with_name("torn")
    shutil.copytree(store, torn)
    victim = max((torn / "layers").rglob("c/2/0/0"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content)
    empty = store.with_name("empty")
    shutil.copytree(store, empty)
    for record in (empty / "manifest").iterdir():
        record.unlink()
    good = f"store.url={store}"
    commands = {
        "missing": [f"store.url={store.with_name('nowhere')}"],
        "empty": [f"store.url={empty}"],
        "torn": [f"store.url={torn}", "stream.batch_size=16", "schedule.tokens=2000", "sae.k=2"],
        "hook": [good, "hook=layers.7.resid_post"],
        "key": [good, "optim.learning_rate=0.1"],
        "type": [good, "stream.batch_size=many"],
        "k": [good, "sae.k=500"],
    }
    begun = {name: start(f"run_dir={store.with_name(name)}", *command) for name, command in commands.items()}
    return {name: process.finish() for name, process in begun.items()}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("missing", "no activation store at"),
        ("empty", "no committed training shard yet"),
        ("torn", "shard 2 of"),
        ("hook", "hook layers.7.resid_post is not in the store at"),
        ("key", "unknown configuration key 'optim.learning_rate'"),
        ("type", "stream.batch_size"),
        ("k", "sae.k=500 is more than the 192 latents"),
    ],
)
def test_a_wrong_input_is_one_line(faults: dict[str, Result], name: str, line: str) -> None:
    assert faults[name].code == 2
    assert "Traceback" not in faults[name].stderr
    (error,) = [text for text in faults[name].stderr.splitlines() if text.startswith("error")]
    assert line in error


def test_a_second_sae_has_a_folder_of_its_own(start: Start, store: Path) -> None:
    """Nothing of the first is touched: not its weights, metrics, log or configuration."""
    run_dir = store.with_name("several")
    common = [f"run_dir={run_dir}", f"store.url={store}", "sae.expansion=4", "schedule.tokens=64"]
    common += ["stream.batch_size=16"]
    done = start(*common, "sae.k=3").finish()
    assert done.code == 0, done.stderr
    before = {path: path.read_bytes() for path in (run_dir / "sae").rglob("*") if path.is_file()}
    done = start(*common, "sae.k=2").finish()
    assert done.code == 0, done.stderr
    log = run_dir / "sae" / "train.log"
    after = {path: path.read_bytes() for path in (run_dir / "sae").rglob("*") if path.is_file()}
    assert after.pop(log).startswith(before.pop(log))  # and one line that says where the other is
    assert after == before
    beside = run_dir / "sae,k=2"
    assert SAE.from_pretrained(beside).config.k == 2
    assert f"the SAE is in {beside}" in (beside / "train.log").read_text()
    assert f"""'sae.path="{beside}"' 'out_dir="{beside}"'""" in done.stderr
    done = start(*common, "sae.k=2", "sae_name=sae").finish()
    assert done.code == 0, done.stderr
    assert f"this one goes to {beside}" in done.stderr
