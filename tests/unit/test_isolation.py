"""What `tests.isolation` promises, in a session of its own with a hostile environment and a checkout of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import isolation

HOSTILE = {"RANK": "3", "WANDB_MODE": "online", "GRANARY_TUNING": "/elsewhere", "COLUMNS": "20", "HF_TOKEN": "mine"}
INNER = """
import os
from pathlib import Path

def test_what_one_test_does():
    assert not any(name in os.environ for name in {names})
    assert os.environ["HOME"] != "{home}"
    assert list(Path.cwd().iterdir()) == list(Path.home().iterdir()) == []
    Path("left").touch()
    Path.home().joinpath("left").touch()
    os.environ["LEFT"] = "1"
    os.chdir("/")

def test_another_does_not_see():
    assert list(Path.cwd().iterdir()) == list(Path.home().iterdir()) == []
    assert "LEFT" not in os.environ

def test_a_third_writes_into_the_checkout():
    Path(__file__).parents[1].joinpath("runs/mine").touch()
"""


@pytest.mark.slow  # a session of its own; each session of the default tests checks what it leaves itself
def test_a_session_reads_nothing_of_the_users_and_fails_when_it_leaves_files(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("composing.py", "conftest.py", "isolation.py"):
        shutil.copy(isolation.REPOSITORY / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(isolation.REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "runs").mkdir()
    inner = INNER.format(names=sorted(HOSTILE), home=os.environ["HOME"])
    (tmp_path / "tests/test_inner.py").write_text(inner)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    environment = {**os.environ, **HOSTILE, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert "error: these appeared in the checkout meanwhile: runs/mine" in done.stdout
    assert done.returncode == 1
