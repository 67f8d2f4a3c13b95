"""Fixtures of the tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shared.store import Store
from tests.training import Runs


@pytest.fixture
def train(tmp_path: Path, planted_store: Callable[..., Store]) -> Runs:
    """``train(name, *overrides)`` trains on a store of one hook; returns the output folder."""
    planted_store(tmp_path / "store")
    return Runs(tmp_path)
