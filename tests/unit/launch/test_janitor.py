"""A folder that lives as long as its user: gone after an orderly end, after SIGKILL, and after its janitor's."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.launch.janitor import LOCK, Janitor
from tests.cli import REPOSITORY

USER = """
import subprocess, sys, time
from pathlib import Path
from shared.launch.janitor import Janitor
folder = Path(sys.argv[1])
janitor = Janitor(folder)
(folder / "deep").mkdir()
(folder / "deep" / "file").write_text("x")
work = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os.mkdir(sys.argv[1]), sys.exit()))"
child = subprocess.Popen([sys.executable, "-c", work + "; print(flush=True); time.sleep(99)", sys.argv[2]],
                         process_group=0, stdout=subprocess.PIPE)
child.stdout.readline()
janitor.end_before(child.pid)
print(janitor._process.pid, child.pid, flush=True)
time.sleep(99)
"""  # noqa: E501 - one line of the child's


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def user(folder: Path, saved: Path) -> "tuple[subprocess.Popen[str], int, int]":
    """A process that uses the folder, its janitor, and a child of it that saves when it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(folder), str(saved)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        janitor, child = map(int, stdout.readline().split())
    return process, janitor, child


def test_it_is_gone_after_the_end(tmp_path):
    folder = tmp_path / "kind-1"
    janitor = Janitor(folder)
    (folder / "file").write_text("x")
    janitor.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(GranaryError, match="can't be made: No such file or directory"):
        Janitor(tmp_path / "missing" / "kind-1")
    with pytest.raises(GranaryError, match="can't be made: File exists"):
        Janitor(tmp_path)
    assert tmp_path.is_dir()


def test_it_is_gone_after_a_kill_and_who_works_in_it_saves_first(tmp_path):
    folder = tmp_path / "kind-1"
    process, _, _ = user(folder, tmp_path / "saved")
    process.kill()
    process.wait()
    wait_until(lambda: not folder.exists())
    assert (tmp_path / "saved").is_dir()


def test_what_a_killed_janitor_leaves_the_next_one_removes(tmp_path):
    process, janitor, child = user(tmp_path / "kind-1", tmp_path / "saved")
    other = tmp_path / "else-1"
    other.mkdir()
    beside = Janitor(tmp_path / "kind-2")
    assert (tmp_path / "kind-1" / LOCK).exists(), "a folder in use is left alone"
    for pid in (janitor, process.pid, child):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "kind-1").exists()
    last = Janitor(tmp_path / "kind-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else-1", "kind-2", "kind-3"]
    beside.close()
    last.close()
    assert [path.name for path in tmp_path.iterdir()] == ["else-1"]
