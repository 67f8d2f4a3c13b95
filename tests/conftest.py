"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """A trained LLaMA and real text from outside the repository, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("GRANARY_REALDATA", REPOSITORY.parent / "shared" / "realdata"))
    if not (folder / "stories260K-hf").is_dir():
        pytest.skip(f"no real model at {folder}: set GRANARY_REALDATA to a folder holding stories260K-hf")
    return folder
