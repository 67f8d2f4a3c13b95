"""Fixtures every test may use."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests import isolation

isolation.begin()  # before the imports below read the environment

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from shared.store import Store
    from tests.cli import ForkServer

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which some test's imports may do at any time

# Pytest adds its handlers to each of PyTorch's forty loggers in each of a test's three phases.
for logger in logging.Logger.manager.loggerDict.values():
    if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
        logger.propagate = True

if importlib.util.find_spec("hypothesis"):  # the peers' environment has none
    from hypothesis import settings

    settings.register_profile("whole", deadline=None)  # a busy machine is no failure
    settings.register_profile("default tests", deadline=None, max_examples=25)

REPOSITORY = isolation.REPOSITORY
BEFORE, LEFT = pytest.StashKey[set[str]](), pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.option.randomly_reset_seed = False  # pytest-randomly chooses the order alone; numbers are as seeded below
    if importlib.util.find_spec("hydra"):  # the kernels are tested on machines without it too
        from tests.composing import remember

        remember()
    if importlib.util.find_spec("hypothesis"):
        settings.load_profile("default tests" if config.option.markexpr.startswith("not slow") else "whole")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.stash[BEFORE] = isolation.listing()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A session whose tests wrote into the checkout fails."""
    is_worker = hasattr(session.config, "workerinput")
    left = sorted(isolation.listing() - session.stash[BEFORE]) if not is_worker else []
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if left:
        session.config.stash[LEFT] = left


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if seed := getattr(config.option, "randomly_seed", None):  # the peers' environment has no pytest-randomly
        terminalreporter.write_line(f"order of the tests: --randomly-seed={seed}")
    if left := config.stash.get(LEFT, []):
        terminalreporter.write_line(f"error: these appeared in the checkout meanwhile: {', '.join(left)}", red=True)


def pytest_unconfigure() -> None:
    isolation.end()


@pytest.fixture(autouse=True, scope="session")
def _between_tests() -> Iterator[None]:
    with isolation.between_tests():
        yield


@pytest.fixture(autouse=True)
def _alone(_between_tests: None) -> Iterator[None]:
    with isolation.alone():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, and every fixture made for it, draws the same numbers whatever ran before."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same; that one keeps a stack trace for each device that is not there
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="module")
def train_configs() -> Iterator[None]:
    """``hydra.compose("train", ...)`` works in this module."""
    # Imported here: the kernels are tested on machines without Hydra too.
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from stage_train import config

    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator["ForkServer"]:
    """``stages.at(folder).run("stage_train", ...)``: the stages' command lines, with the imports done once."""
    from tests.cli import STAGES, ForkServer
    from tests.disk import failing_disk_library

    folder, session = tmp_path_factory.mktemp("stages"), tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # of all workers
    with ForkServer(folder, session / "stages.socket", STAGES, failing_disk_library(folder)) as server:
        yield server


@pytest.fixture(scope="session")
def realdata() -> Path:
    """A trained LLaMA and real text from outside the repository, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("GRANARY_REALDATA", REPOSITORY.parent / "shared" / "realdata"))
    if not (folder / "stories260K-hf").is_dir():
        pytest.skip(f"no real model at {folder}: set GRANARY_REALDATA to a folder holding stories260K-hf")
    return folder


@pytest.fixture(scope="session")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., "Store"]:
    """``make(folder, ...)``: a small store of sparse combinations of 24 directions; a copy of the first such one.

    Shards have 4 contexts of 16 positions of width 12; the last fifth of them is held out. `outliers` tokens, chosen
    among all, are a hundred times too large.
    """
    # Imported here: the kernels are tested on machines without zarr too.
    from shared.store import Store, StorePlan

    made: dict[tuple[object, ...], Path] = {}

    def make(
        folder: Path,
        shards: int = 6,
        hooks: tuple[str, ...] = ("layers.1.resid_post",),
        seed: int = 0,
        outliers: int = 0,
    ) -> Store:
        key = (shards, hooks, seed, outliers)
        if key not in made:
            first = tmp_path_factory.mktemp("planted") / "store"
            plant(first, shards, hooks, seed, outliers)
            made[key] = first
        shutil.copytree(made[key], folder)
        return Store.open(folder)

    def plant(folder: Path, shards: int, hooks: tuple[str, ...], seed: int, outliers: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (4 * shards, 16)
        plan = StorePlan(
            num_contexts=4 * shards,
            seq_len=16,
            hooks=dict.fromkeys(hooks, 12),
            dtype="float32",
            shard_contexts=4,
            chunk_tokens=16,
            codec="none",
            heldout_fraction=0.2,
            heldout_placement="last",
            provenance={"model": {"id": "planted"}},
            versions={},
        )
        mask = rng.random(shape) < 0.9
        tokens = np.zeros(shape, np.int32)
        store = Store.create(folder, plan, tokens, mask, tokens)
        codes = rng.random((*shape, 24)) * (rng.random((*shape, 24)) < 0.1)
        activations = torch.from_numpy((codes @ rng.standard_normal((24, 12))).astype(np.float32))
        activations.view(-1, 12)[rng.choice(shape[0] * shape[1], outliers, replace=False)] *= 100
        for shard in store.pending():
            span = store.shard_contexts(shard)
            store.write_shard(shard, {hook: activations[span.start : span.stop].contiguous() for hook in hooks})

    return make
