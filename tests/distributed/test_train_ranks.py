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

from shared.sae import SAE, load_provenance
from shared.store import Store
from stage_train.loggers import read_metrics

WORKER = Path(__file__).with_name("train_worker.py")
ROOT = WORKER.parents[2]
Job = dict[str, Any]


def job(folder: Path, name: str, *overrides: str, **faults: int) -> Job:
    fixed = ["sae.k=3", "sae.expansion=8", "stream.batch_size=21", "stream.lanes=4", "schedule.tokens=630"]
    fixed += [
        "logger.progress=false",
        "logger.curves=false",
        "logger.every=5",
        "checkpoint.every=0",
        "sae.dead_after_tokens=40",
    ]
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
def runs(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> tuple[Path, dict[Any, Any]]:
    """All runs of this file, with as few process starts as possible."""
    folder = tmp_path_factory.mktemp("ranks")
    planted_store(folder / "store", outliers=3)
    ends: dict[Any, Any] = {}
    ends[1] = run(
        folder, 1, [job(folder, "one"), job(folder, "to_fsdp", stop_at=9), job(folder, "to_latent", stop_at=9)]
    )
    ends[2] = run(
        folder,
        2,
        [
            job(folder, "ddp"),
            job(folder, "fsdp", "parallel=fsdp"),
            job(folder, "fsdp_micro", "parallel=fsdp", "optim.micro_batch=4"),
            job(folder, "latent", "parallel=latent"),
            job(folder, "to_fsdp", "parallel=fsdp"),
            job(folder, "to_latent", "parallel=latent", stop_at=13),
            job(folder, "from_fsdp", "parallel=fsdp", stop_at=13),
            job(folder, "poisoned", poison=7),
            job(folder, "three_lanes", "stream.lanes=3"),
            job(folder, "odd", "parallel=latent", "sae.d_latent=95"),
            job(folder, "outliers", "stream.max_norm_multiple=1.5"),
        ],
    )
    ends[4] = run(
        folder,
        4,
        [
            job(folder, "mesh", "parallel=latent", "parallel.latent=2"),
            job(folder, "from_fsdp", "parallel=latent", "parallel.latent=2"),
            job(folder, "to_latent"),
            job(folder, "short", "stream.batch_size=3", "schedule.tokens=60"),
            job(folder, "short_fsdp", "parallel=fsdp", "stream.batch_size=3", "schedule.tokens=60"),
        ],
    )
    ends["one"] = run(
        folder,
        1,
        [
            job(folder, "short_one", "stream.batch_size=3", "schedule.tokens=60"),
            job(folder, "outliers_one", "stream.max_norm_multiple=1.5"),
        ],
    )
    return folder, ends


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp_micro", "latent", "mesh"])
def test_every_layout_equals_one_process(runs: tuple[Path, Any], layout: str) -> None:
    """Weights, losses, dead counts, gradient norms: 30 steps with dead latents, short batches and a new epoch."""
    folder, _ = runs
    assert_close_weights(folder / "one", folder / layout)
    for one, two in zip(read_metrics(folder / "one"), read_metrics(folder / layout), strict=True):
        for name in ("step", "tokens", "epoch", "loss", "auxk", "fvu", "l0", "dead_fraction", "lr", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-7), name
    assert any(line["auxk"] > 0 for line in read_metrics(folder / "one"))
    assert read_metrics(folder / "one")[-1]["epoch"] >= 1


@pytest.mark.parametrize(
    ("name", "stopped", "done"),
    [
        ("to_fsdp", [(1, 1)], (2, 4)),  # one process, then FSDP on two
        ("to_latent", [(1, 2), (2, 5)], (4, 2)),  # one process, latent parallel on two, data parallel on four
        ("from_fsdp", [(2, 6)], (4, 1)),  # FSDP on two, a 2 x 2 mesh on four
    ],
)
def test_resume_under_another_layout(
    runs: tuple[Path, Any], name: str, stopped: list[tuple[int, int]], done: tuple[int, int]
) -> None:
    folder, ends = runs
    for world, index in stopped:
        assert {rank[index] for rank in ends[world]} == {"stopped"}
    assert {rank[done[1]] for rank in ends[done[0]]} == {"done"}
    assert_close_weights(folder / "one", folder / name)


def test_a_nan_on_one_rank_stops_all_with_the_same_line(runs: tuple[Path, Any]) -> None:
    _, ends = runs
    lines = {rank[7] for rank in ends[2]}
    assert len(lines) == 1
    assert "training diverged by step 10 (loss nan" in lines.pop()


def test_what_does_not_divide_stops_all_ranks(runs: tuple[Path, Any]) -> None:
    _, ends = runs
    assert all("3 lanes do not divide among 2 processes" in rank[8] for rank in ends[2])
    assert all("95 latents do not divide among parallel.latent=2" in rank[9] for rank in ends[2])


def test_ranks_find_the_same_outliers_as_one_process(runs: tuple[Path, Any]) -> None:
    folder, _ = runs
    assert_close_weights(folder / "outliers_one", folder / "outliers")
    assert load_provenance(folder / "outliers")["tokens"] == load_provenance(folder / "outliers_one")["tokens"]


@pytest.mark.parametrize("name", ["short", "short_fsdp"])
def test_ranks_without_rows_take_part(runs: tuple[Path, Any], name: str) -> None:
    """Batches of 3 tokens over 4 ranks: some rank has none in every step."""
    folder, _ = runs
    assert_close_weights(folder / "short_one", folder / name)
