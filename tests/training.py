"""What tests of training share: a folder of runs on one store, faults in mid-run, and comparisons."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from shared.basics.metrics_file import read_metrics
from shared.parallel import World
from shared.sae.loading import load
from stage_train.job import Job
from stage_train.step import loop
from tests.composing import composed

WORLD = World(0, 1, 0, torch.device("cpu"))
TIMES = {"tokens_per_s", "wait_share"}
FIXED = [
    "sae.k=3", "sae.expansion=8", "stream.batch_size=16", "stream.lanes=4", "schedule.tokens=640",
    "logger.progress=false", "logger.curves=false", "logger.every=5", "checkpoint.every=0", "sae.dead_after_tokens=40",
]  # fmt: skip
Watch = Callable[[Any], None]


@contextmanager
def watching(before: Watch = lambda run: None, after: Watch = lambda run: None) -> Iterator[None]:
    """Within it, `before` and `after` are called with the run around every step."""

    class Watcher:
        def before_step(self, run: Any, batch: Any) -> None:
            before(run)

        def after_step(self, run: Any, batch: Any) -> None:
            after(run)

    watcher = Watcher()
    loop.observers.append(watcher)
    try:
        yield
    finally:
        loop.observers.remove(watcher)


def signalled_in(step: int, number: signal.Signals = signal.SIGTERM, which: str | None = None) -> Watch:
    """Before that step (of the run `which`, if there are several) the process receives a signal."""

    def before(run: Any) -> None:
        if run.step == step - 1 and which in (None, run.name):
            os.kill(os.getpid(), number)

    return before


def interrupted_after(step: int) -> Watch:
    """When that many steps are done and what it had begun to save is on disk, the process ends as it stands."""

    def before(run: Any) -> None:
        if run.step == step:
            run.wait_for_save()
            raise Died

    return before


class Died(BaseException):
    """The process is gone: nothing may handle it."""


class Runs:
    """Runs in one folder, on the store beside them."""

    def __init__(self, folder: Path, *fixed: str) -> None:
        """`fixed` are overrides of all runs."""
        self.folder, self.fixed = folder, (*FIXED, *fixed)

    def cfg(self, name: str, *overrides: str) -> Any:
        """The configuration of one run."""
        paths = [f"out_dir='{self.folder / name}'", f"store.url={self.folder / 'store'}"]
        return OmegaConf.to_object(composed("train", [*self.fixed, *paths, *overrides]))

    def __call__(self, name: str, *overrides: str) -> Path:
        """Train; returns the run's folder."""
        Job([self.cfg(name, *overrides)], WORLD).execute()
        return self.folder / name

    def together(self, runs: dict[str, list[str]]) -> None:
        """Train several runs from one pass."""
        Job([self.cfg(name, *overrides) for name, overrides in runs.items()], WORLD).execute()

    def stopped(self, name: str, *overrides: str, step: int) -> Path:
        """Train until SIGTERM comes in that step; returns the run's folder."""
        with watching(before=signalled_in(step)):
            code = exit_code(lambda: self(name, *overrides))
        assert code == 128 + signal.SIGTERM
        return self.folder / name

    def killed(self, name: str, *overrides: str, step: int) -> Path:
        """Train until the process dies after that many steps; returns the run's folder."""
        try:
            with watching(before=interrupted_after(step)):
                self(name, *overrides)
        except Died:
            return self.folder / name
        raise AssertionError("the run ended before it could die")


def exit_code(work: Callable[[], object]) -> int | None:
    """With which status the process would end; fails the test where it would not."""
    with pytest.raises(SystemExit) as end:
        work()
    code = end.value.code
    assert code is None or isinstance(code, int)
    return code


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of an exported dictionary."""
    return load(folder).state_dict()


def assert_same_weights(one: Path, two: Path) -> None:
    """Bit for bit."""
    first, second = weights(one), weights(two)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def timeless(folder: Path) -> list[dict[str, float]]:
    """All that was logged but times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: weights, and all that was logged but times."""
    assert_same_weights(one, two)
    assert timeless(one) == timeless(two)


def training_state(**changes: Any) -> dict[str, Any]:
    """What ``training.json`` of a checkpoint must hold, any key of which may be changed."""
    stream = {"epoch": 0, "batch": 7, "order": {"seed": 0}, "tokens": 448}
    store = {"url": "store", "weight": 1.0, "shards": [0, 1], "digest": "0" * 64}
    given = {"step": 7, "tokens": 448, "identity": {}, "stores": [store], "stream": stream, "sae": {}, "provenance": {}}
    return {**given, **changes}
