"""A folder that is there as long as the process that uses it: a process of its own removes it, however that one ends.

    python -m shared.launch.janitor FOLDER

It makes the folder, says ``ready`` and reads its standard input, a pipe whose other end the user of the folder alone
holds: the kernel closes it when that process ends, be it by SIGKILL. Lines that come are ids of process groups that
work in the folder; they are ended before it is removed. What a janitor that was killed itself has left is removed by
the next one: the lock on a folder in use is gone then.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from shared.basics.errors import GranaryError

LOCK = "in-use"
# Seconds in which a process saves what it has, and in which a folder may be without its lock.
PATIENCE, YOUNG = 600.0, 60.0
POLL = 0.1


class Janitor:
    """The user's end: the folder exists until `close`, or until this process ends."""

    def __init__(self, folder: Path) -> None:
        """Raises GranaryError where the folder can't be made."""
        command = [sys.executable, "-m", "shared.launch.janitor", str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
        )
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            told = stdout.readline().strip()
        if told != "ready":
            self.close()
            raise GranaryError(f"{folder} can't be made: {told or 'its process ended'}")

    def end_before(self, group: int) -> None:
        """Have a process group ended before the folder is removed."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Remove the folder, and wait until it is gone."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """The process itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    try:
        folder.mkdir()
        lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        print(error.strerror, flush=True)  # noqa: T201
        return
    groups: list[int] = []
    try:
        remove_leftovers(folder)
        with suppress(BrokenPipeError):
            print("ready", flush=True)  # noqa: T201
        groups.extend(map(int, sys.stdin))
    finally:
        end(groups)
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the folders of the same kind beside `folder` that no janitor looks after."""
    kind = folder.name.rpartition("-")[0]
    for other in folder.parent.glob(f"{kind}-*"):
        if other != folder and is_left(other):
            shutil.rmtree(other, ignore_errors=True)


def is_left(folder: Path) -> bool:
    """Whether nobody uses a folder: its lock is free, or it has been without one for a while."""
    try:
        lock = os.open(folder / LOCK, os.O_WRONLY)
    except FileNotFoundError:
        with suppress(FileNotFoundError):
            return time.time() - folder.stat().st_mtime > YOUNG
        return False
    except OSError:  # another user's
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def end(groups: list[int]) -> None:
    """End process groups: by SIGTERM, upon which training saves, and those that stay by SIGKILL."""
    signalled(groups, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, groups)):
        if time.monotonic() > deadline:
            signalled(groups, signal.SIGKILL)
        time.sleep(POLL)


def signalled(groups: list[int], number: signal.Signals) -> None:
    """Send a signal to those that are there."""
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def is_alive(group: int) -> bool:
    """Whether a process group has a process that has not ended; one that nobody has waited for has."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    states = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _parent, of = file.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(of) == group else []
    return not states or any(state not in "ZX" for state in states)


if __name__ == "__main__":
    main()
