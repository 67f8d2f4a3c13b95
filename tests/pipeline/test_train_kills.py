"""SIGKILL at random moments of real training commands, the same command again each time: as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.parallel import World
from shared.sae import SAE
from shared.store import Store
from stage_train.state.checkpoint import newest_checkpoint
from stage_train.state.lock import only_run_in
from tests.cli import ForkServer

TIMES = {"tokens_per_s", "wait_share"}
KILLS = 4
RECORD_BYTES = 32 + 16 * 12 * 4
COMMON = ["sae.k=3", "sae.expansion=8", "stream.batch_size=16", "sae.dead_after_tokens=500", "logger.every=10"]
COMMON += ["checkpoint.every=25", "checkpoint.keep=2", "logger.progress=false", "logger.curves=false"]

# Trains, and writes down every batch.
RECORDER, FILE = str(Path(__file__).with_name("recorder.py")), "batches.bin"


def batches(folder: Path) -> tuple[list[bytes], int]:
    """The batches that the weights of a finished run have seen, in order, and how many more were lost to kills."""
    data, place, seen, lost = (folder / FILE).read_bytes(), 0, [], 0
    while place < len(data):
        step, _, _, values = np.frombuffer(data, np.int64, 4, place)
        end = place + 32 + 4 * int(values)
        assert end <= len(data)
        assert step <= len(seen), "a batch was skipped"
        lost += len(seen) - int(step)
        seen[int(step) :] = [data[place:end]]
        place = end
    return seen, lost


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Store:
    return planted_store(tmp_path_factory.mktemp("kills") / "store")


@pytest.fixture(scope="module")
def server(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    return stages.at(tmp_path_factory.mktemp("server"))


def command(store: Store, folder: Path, tokens: int) -> list[str]:
    return [*COMMON, f"schedule.tokens={tokens}", f"store.url={store.url}", f"run_dir={folder}", f"out_dir={folder}"]


def assert_same_run(straight: Path, broken: Path) -> None:
    """Bit for bit: weights, and every line of the metrics but its times."""
    first, second = (SAE.from_pretrained(folder).state_dict() for folder in (straight, broken))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    lines = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]
        for folder in (straight, broken)
    ]
    assert lines[0] == lines[1]


def test_killed_at_random_moments_nothing_is_repeated_or_skipped(
    server: ForkServer, store: Store, tmp_path: Path
) -> None:
    """The batches that count are those of an uninterrupted run, byte for byte; so are weights and metrics."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert server.run(RECORDER, *command(store, straight, 8_000)).code == 0
    steps = len(read_metrics(straight)) * 10

    moments = random.Random(0)
    for _ in range(KILLS):
        process = server.start(RECORDER, *command(store, broken, 8_000))
        wait_for_growth(broken / FILE, moments.randrange(steps // (2 * KILLS)))
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    result = server.run(RECORDER, *command(store, broken, 8_000))
    assert result.code == 0, result.stderr

    seen, lost = batches(broken)
    assert seen == batches(straight)[0]
    assert lost > 0, "no kill fell between a checkpoint and the next"
    assert_same_run(straight, broken)
    assert_each_token_once(store, seen)


def wait_for_growth(file: Path, num_batches: int) -> None:
    """Until so many more batches are written; at once for none, which is while the process starts."""
    size = file.stat().st_size if file.exists() else 0
    deadline = time.monotonic() + 280
    while num_batches and (file.stat().st_size if file.exists() else 0) < size + num_batches * RECORD_BYTES:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_each_token_once(store: Store, seen: list[bytes]) -> None:
    """The batches of the first epoch hold every trainable token of the store."""
    headers = [np.frombuffer(record, np.int64, 4) for record in seen]
    parts = [record[32:] for record, header in zip(seen, headers, strict=True) if header[1] == 0]
    read = np.frombuffer(b"".join(parts), np.float32).reshape(-1, 12)
    (hook,) = store.hooks
    contexts = [int(context) for context in store.contexts("train")]
    masks = store.mask(contexts)
    rows = [store.read_context(hook, context).numpy()[mask] for context, mask in zip(contexts, masks, strict=True)]
    assert sorted(row.tobytes() for row in read) == sorted(row.tobytes() for row in np.concatenate(rows))


def test_one_run_per_folder(server: ForkServer, store: Store, tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a", World(0, 1, 0, torch.device("cpu"))):
        refused = server.run("stage_train", *command(store, tmp_path / "a", 160))
    assert f"another run is training into {tmp_path / 'a'}: wait for it, end it, or give sae_name=..." in refused.error
    assert server.run("stage_train", *command(store, tmp_path / "a", 160)).code == 0
    (tmp_path / "file").touch()
    impossible = server.run("stage_train", *command(store, tmp_path / "b", 160), f"out_dir={tmp_path / 'file/sae'}")
    assert "file/sae: Not a directory; set out_dir" in impossible.error


@pytest.mark.slow
@pytest.mark.parametrize(("nproc", "kills"), [(1, 16), (2, 8)])
def test_many_kills_of_the_command_line(store: Store, tmp_path: Path, nproc: int, kills: int) -> None:
    """``python -m stage_train`` from a shell; with nproc=2, the command and all its processes at once."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    tokens, moments, target = 48_000, random.Random(nproc), 0

    def start(folder: Path) -> "subprocess.Popen[bytes]":
        line = [*command(store, folder, tokens), f"nproc={nproc}", "stream.lanes=4"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "stage_train", *line], env=environment)

    assert start(straight).wait(timeout=200) == 0
    for _ in range(kills):
        process = start(broken)
        if moments.random() < 0.3:  # while it starts
            time.sleep(moments.uniform(0, 2))
        else:
            target += moments.randrange(tokens // 16 // (3 * kills))
            while max((line["step"] for line in read_metrics(broken)), default=0) < target:
                assert process.poll() is None
                time.sleep(0.005)
            time.sleep(moments.choice([0.0, 0.01, 0.1]))
        assert process.poll() is None
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        process.wait()
    assert start(broken).wait(timeout=200) == 0
    assert_same_run(straight, broken)


@pytest.mark.slow
def test_killing_the_command_alone_ends_its_ranks_too(store: Store, tmp_path: Path) -> None:
    """SIGKILL cannot be passed on, but the ranks are told by the kernel, and save; meanwhile the folder is theirs."""
    line = [*command(store, tmp_path, 10_000_000), "checkpoint.every=0", "nproc=2", "stream.lanes=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "stage_train", *line], env=environment)
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while newest_checkpoint(tmp_path / "checkpoints") is None:
        assert time.monotonic() < deadline, "the ranks train on"
        time.sleep(0.05)
    world = World(0, 1, 0, torch.device("cpu"))
    while time.monotonic() < deadline:
        try:
            with only_run_in(tmp_path, world):
                break
        except GranaryError:
            time.sleep(0.05)
    else:
        raise AssertionError("the ranks hold the folder")
