"""What the tests of concepts share."""

from pathlib import Path

import pytest

from tests.planted import planted_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder whose latents 3, 4 and 5 are numbers, self and comments of Python."""
    return planted_study(tmp_path_factory.mktemp("planted"))
