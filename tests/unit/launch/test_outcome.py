"""How commands end."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import OverrideParseException

from shared.basics.errors import GranaryError
from shared.launch.commands import COMMANDS
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import LogFile, ShownFormatter
from tests.cli import REPOSITORY


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (GranaryError("two\nlines \x1b[1m"), 2, "error: two lines \\x1b[1m"),
        (OSError(errno.ENOSPC, "No space", "/a/b"), 2, "error: /a/b can't be written (No space): make room there"),
        (OSError(errno.EACCES, "Denied", "/a/b"), 2, "error: /a/b can't be read or written (Denied)"),
        (OSError(errno.EMFILE, "Too many", "/a"), 2, "error: /a can't be opened (Too many): raise ulimit -n"),
        (
            RuntimeError("(os error 28)"),
            2,
            "error: the output can't be written (No space left on device)",
        ),
        (RecursionError("maximum depth"), 2, "error: the input is nested too deep"),
        (OverrideParseException("a b=1", "Lexer"), 2, "error: a b=1 can't be read: write key=value"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, ending_in_one_line():
        raise error
    assert end.value.code == status
    told = capsys.readouterr().err
    assert told.startswith(line)
    assert told.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.EBADF, "Bad"), RuntimeError("(os error 9)")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), ending_in_one_line():
        raise error


def test_output_that_nobody_takes() -> None:
    """A full disk behind > is an error, a pipe that is closed is not spoken of."""
    command = [sys.executable, "-m", "granary", "--help"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the output can't be written (No space left on device)")
    assert done.stderr.count("\n") == 1
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_log_that_can_not_be_written_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/dev/full", "/no/such/folder/train.log"):
        handler = LogFile(path)
        handler.setFormatter(ShownFormatter("%(message)s"))
        logger = logging.Logger("one")
        logger.addHandler(handler)
        for _ in range(3):
            logger.info("a line")
        handler.close()
        told = capsys.readouterr().err
        assert told.startswith(f"the log {path} can't be written: ")
        assert told.count("\n") == 1


def test_every_command_ends_so() -> None:
    """No other place turns an error into a line: what one command tells, all tell."""
    for room in ("shared", "granary", "stage_*", "examples"):
        for path in (path for folder in REPOSITORY.glob(room) for path in folder.rglob("*.py")):
            ends_itself = "fail(str(error))" in path.read_text(encoding="utf-8")
            assert ends_itself == (path.name == "outcome.py"), path
    for module in (one.module.replace(".", "/") for one in COMMANDS.values()):
        files = (REPOSITORY / f"{module}.py", REPOSITORY / module / "__main__.py")
        text = next(path for path in files if path.exists()).read_text(encoding="utf-8")
        assert any(name in text for name in ("ending_in_one_line", "run_stage", "import main")), module
