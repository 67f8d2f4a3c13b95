"""Fixtures of the tests of training."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from shared.store import Store
from tests.training import Runs


@pytest.fixture
def train(tmp_path: Path, planted_store: Callable[..., Store]) -> Runs:
    """``train(name, *overrides)`` trains on a store of one hook; returns the output folder."""
    planted_store(tmp_path / "store")
    return Runs(tmp_path)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, planted_store: Callable[..., Store]) -> Callable[[], Path]:
    """``straight()`` is the folder of a finished run of `train` without overrides, to compare others with.

    Trained when it is first asked for: configurations are composed within modules.
    """

    @cache
    def trained() -> Path:
        folder = tmp_path_factory.mktemp("straight")
        planted_store(folder / "store")
        return Runs(folder)("straight")

    return trained
