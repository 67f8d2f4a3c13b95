"""Training in several real processes equals training in one; stops and faults on one rank are everyone's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.sae import SAE
from shared.store import Store
from stage_train.loggers import read_metrics

WORKER = Path(__file__).with_name("train_worker.py")
ROOT = WORKER.parents[2]
Job = dict[str, Any]


def job(folder: Path, name: str, *overrides: str, **faults: int) -> Job:
    fixed = ["sae.k=3", "sae.expansion=8", "stream.batch_size=21", "stream.lanes=4", "schedule.tokens=630"]
    fixed += ["logger.progress=false", "logger.every=5", "checkpoint.every=0", "sae.dead_after_tokens=40"]
    paths = [f"out_dir={folder / name}", f"store.url={folder / 'store'}"]
    return {"overrides": [*fixed, *paths, *overrides], **faults}


def run(folder: Path, world: int, jobs: list[Job]) -> list[list[str]]:
    """Run jobs in `world` processes; for each rank, how each job ended."""
    file = folder / f"jobs-{world}.json"
    file.write_text(json.dumps(jobs))
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "shared.parallel.launch", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(WORKER), str(file)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(world)]


def assert_close_weights(one: Path, two: Path) -> None:
    first, second = (SAE.from_pretrained(folder).state_dict() for folder in (one, two))
    for name, tensor in first.items():
        torch.testing.assert_close(
            second[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> tuple[Path, dict[int, Any]]:
    """All runs of this file, with as few process starts as possible."""
    folder = tmp_path_factory.mktemp("ranks")
    planted_store(folder / "store")
    ends: dict[int, Any] = {}
    ends[1] = run(folder, 1, [job(folder, "one"), job(folder, "from1", stop_at=9)])
    ends[2] = run(
        folder,
        2,
        [
            job(folder, "two"),
            job(folder, "from1"),
            job(folder, "from2", stop_at=13),
            job(folder, "poisoned", poison=7),
            job(folder, "three_lanes", "stream.lanes=3"),
        ],
    )
    ends[4] = run(folder, 4, [job(folder, "from2"), job(folder, "short", "stream.batch_size=3", "schedule.tokens=60")])
    return folder, ends


def test_two_processes_equal_one(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    assert_close_weights(folder / "one", folder / "two")
    for one, two in zip(read_metrics(folder / "one"), read_metrics(folder / "two"), strict=True):
        for name in ("step", "tokens", "epoch", "loss", "auxk", "fvu", "l0", "dead_fraction", "lr", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-7), name
    assert any(line["auxk"] > 0 for line in read_metrics(folder / "one"))


@pytest.mark.parametrize(("name", "before", "after"), [("from1", 1, 2), ("from2", 2, 4)])
def test_resume_with_another_number_of_processes(runs: tuple[Path, Any], name: str, before: int, after: int) -> None:
    folder, ends = runs
    order = {1: 1, 2: 2 if name == "from2" else 1, 4: 0}
    assert {rank[order[before]] for rank in ends[before]} == {"stopped"}
    assert {rank[order[after]] for rank in ends[after]} == {"done"}
    assert_close_weights(folder / "one", folder / name)


def test_a_nan_on_one_rank_stops_all_with_the_same_line(runs: tuple[Path, Any]) -> None:
    _, ends = runs
    lines = {rank[3] for rank in ends[2]}
    assert len(lines) == 1
    assert "training diverged by step 10 (loss nan" in lines.pop()


def test_lanes_that_do_not_divide_stop_all_ranks(runs: tuple[Path, Any]) -> None:
    _, ends = runs
    assert all("3 lanes do not divide among 2 processes" in rank[4] for rank in ends[2])


def test_ranks_without_rows_take_part(runs: tuple[Path, Any]) -> None:
    """Batches of 3 tokens over 4 ranks: some rank has none in every step."""
    folder, ends = runs
    assert {rank[1] for rank in ends[4]} == {"done"}
    assert read_metrics(folder / "short")[-1]["tokens"] >= 60
