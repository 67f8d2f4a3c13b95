"""Training runs in this process and in several, in one folder, with comparisons: what tests of ranks share."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_module

from shared.basics.metrics_file import read_metrics
from shared.parallel import World
from stage_train import config
from tests.cli import ForkServer
from tests.closeness import REORDERED, SAME_RUN, assert_close_in_norm
from tests.training import TIMES, weights

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "distributed" / "train_worker.py"
Ends = dict[str, set[str]]


class Runs:
    """Runs of one folder; ``ends[name]`` is how the run ended last, one entry per different answer of its ranks."""

    def __init__(self, stages: ForkServer, folder: Path, *fixed: str) -> None:
        """`fixed` are overrides of all runs."""
        self.stages, self.folder, self.fixed = stages, folder, fixed
        self.ends: Ends = {}

    def job(self, name: str, *overrides: str, job: str = "train", **arguments: int) -> dict[str, Any]:
        """A run in the folder `name`, by one of JOBS of train_worker.py with its `arguments`."""
        paths = [f"out_dir={self.folder / name}", f"store.url={self.folder / 'store'}"]
        return {"job": job, "name": name, "overrides": [*self.fixed, *paths, *overrides], **arguments}

    def alone(self, *jobs: dict[str, Any]) -> None:
        """In this process."""
        spec = importlib.util.spec_from_file_location("train_worker", WORKER)
        assert spec is not None
        assert spec.loader is not None
        worker = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(worker)
        config.register()
        with initialize_config_module("conf", version_base="1.3"):
            for job in jobs:
                self.ends[job["name"]] = {worker.run(job, World(0, 1, 0, torch.device("cpu")))}

    def together(self, world: int, *jobs: dict[str, Any]) -> None:
        """In `world` processes, one job after the other."""
        file = self.folder / f"jobs-{world}.json"
        file.write_text(json.dumps(jobs))
        ranks = self.stages.at(self.folder).ranks(world, str(WORKER), str(file))
        for rank in sorted(ranks, key=lambda one: -one.code):  # the one that failed before those it ended
            assert rank.code == 0, rank.stderr
        ranks = [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(world)]
        for index, job in enumerate(jobs):
            self.ends[job["name"]] = {rank[index] for rank in ranks}

    def assert_close(self, one: str, two: str, bound: float = SAME_RUN) -> None:
        first, second = (weights(self.folder / name) for name in (one, two))
        for name, tensor in first.items():
            assert_close_in_norm(second[name], tensor, bound, f"{name} after the same batches, {REORDERED}")


def assert_same_run(runs: Runs, one: str, two: str, bound: float = SAME_RUN) -> None:
    """Weights, and all that was logged but times."""
    runs.assert_close(one, two, bound)
    for first, second in zip(read_metrics(runs.folder / one), read_metrics(runs.folder / two), strict=True):
        assert second.keys() == first.keys()
        for name in first.keys() - TIMES:
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-7), name
