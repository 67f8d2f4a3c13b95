"""``granary train online=true harvest.KEY=VALUE ... KEY=VALUE ...``: harvest and train at once, the store in memory.

The harvest and the training are the ordinary stages, each a child process, over a store with a window
(``shared.store.window``) on a RAM disk. So weights, checkpoints and what goes on after a stop are those of the two
commands by themselves; only nothing of the store is left, however it ends.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from shared.basics.errors import GranaryError
from shared.launch.janitor import Janitor
from shared.launch.orphans import environment_of_child
from shared.launch.outcome import ending_in_one_line

FLAG, DISK, HARVEST = "online", "ram_disk", "harvest."
MEMORY = Path("/dev/shm")
IN_MEMORY = "GRANARY_STORE_IN_MEMORY"
"""Set for a training whose store is gone when it ends."""
OURS = ("store.url", "store.heldout_fraction", "spool_dir", "run_dir", "name", "dry_run")
"""What the harvest is told here."""
SHARED = ("run_dir", "name")
"""What the training is told, and the harvest with it."""
POLL = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Process: TypeAlias = "subprocess.Popen[bytes]"


@dataclass(frozen=True)
class Commands:
    """What the two stages are told, but for the places of store and tokens."""

    harvest: list[str]
    train: list[str]
    disk: Path


def is_wanted(arguments: Sequence[str]) -> bool:
    """Whether a command line of training asks for it."""
    return f"{FLAG}=true" in (argument.lower() for argument in arguments)


def is_in_memory() -> bool:
    """Whether this process trains from a store that is gone when it ends."""
    return IN_MEMORY in os.environ


def commands(arguments: Sequence[str]) -> Commands:
    """The command lines of the two; raises GranaryError for what does not go together."""
    harvest, train, disk = [], [], MEMORY
    for argument in arguments:
        key, _, value = argument.lstrip("+~").partition("=")
        if key.startswith(HARVEST):
            harvest.append(argument.replace(HARVEST, "", 1))
        elif key == DISK:
            disk = Path(value)
        elif key != FLAG:
            train.append(argument)
    for argument in harvest:
        key = argument.lstrip("+~").partition("=")[0]
        if key in OURS:
            raise GranaryError(f"{HARVEST}{argument}: with {FLAG}=true that is decided here, leave it out")
    for argument in train:
        key = argument.lstrip("+~").partition("=")[0]
        if key.startswith("store.") or argument in ("-m", "--multirun") or argument.lower() == "packed=true":
            raise GranaryError(f"{argument} does not go with {FLAG}=true, which trains one SAE from a store of its own")
        if key in SHARED:
            harvest.append(argument)
    if not any(argument.startswith("store.window=") for argument in harvest):
        raise GranaryError(f"{FLAG}=true needs the most memory for activations: {HARVEST}store.window=8GB")
    if not disk.is_dir():
        raise GranaryError(f"there is no folder {disk}: name a RAM disk, or a folder of a fast disk, by {DISK}=FOLDER")
    return Commands(harvest, train, disk)


def main() -> None:
    """Run both; exits with the status of training, or of the harvest where that failed."""
    with ending_in_one_line():
        status = Online(commands(sys.argv[1:])).run()
    if status:
        sys.exit(status if status > 0 else 128 - status)


class Online:
    """The two processes and the folder they meet in."""

    def __init__(self, given: Commands) -> None:
        self.given = given
        self.folder = given.disk / f"granary-online-{secrets.token_hex(8)}"
        self.store, self.log = self.folder / "store", self.folder / "harvest.log"
        self.running: dict[str, Process] = {}
        self.stopped: int | None = None
        """The signal that was received first."""

    def run(self) -> int:
        """Harvest and train until both have ended; returns the status."""
        with ExitStack() as stack:
            previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
            stack.callback(lambda: [signal.signal(*pair) for pair in previous.items()])
            self.janitor = Janitor(self.folder)
            stack.callback(self.janitor.close)
            settings = [f"store.url={self.store}", f"spool_dir={self.folder}", "store.heldout_fraction=0"]
            harvest = self._start("stage_harvest", [*self.given.harvest, *settings])
            while harvest.poll() is None and not self._has_tokens() and self.stopped is None:
                time.sleep(POLL)
            if self.stopped is not None or not self._has_tokens():
                return self._ended(harvest)
            train = self._start("stage_train", [*self.given.train, f"store.url={self.store}"])
            while train.poll() is None and harvest.poll() in (None, 0):
                time.sleep(POLL)
            if harvest.poll():
                train.send_signal(signal.SIGTERM)
                train.wait()
                return self._ended(harvest)
            if train.returncode or self.stopped is not None:
                harvest.terminate()
            harvest.wait()  # it sees that training has ended
            return train.returncode

    def _start(self, module: str, arguments: Sequence[str]) -> Process:
        """Start a stage in a process group of its own. What the harvest says is kept for when it fails."""
        environment = {**environment_of_child(), IN_MEMORY: "1"}
        command = [sys.executable, "-m", module, *arguments]
        with ExitStack() as stack:
            output = stack.enter_context(self.log.open("wb")) if module == "stage_harvest" else None
            process = subprocess.Popen(command, env=environment, process_group=0, stdout=output, stderr=output)
        self.janitor.end_before(process.pid)
        self.running[module] = process
        if self.stopped is not None:  # a signal came meanwhile
            process.send_signal(self.stopped)
        return process

    def _has_tokens(self) -> bool:
        """Whether the store is there: its window comes first, its tokens, and last this record of them."""
        return (self.store / "extents/00000000.tokens.json").exists()

    def _ended(self, harvest: Process) -> int:
        """The status of a harvest that was stopped or has failed, after saying why."""
        if self.stopped is not None:
            harvest.terminate()
        status = harvest.wait()
        if self.stopped is not None:
            return 128 + self.stopped
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("error")] or lines[-20:]
        print("\n".join(told), file=sys.stderr)  # noqa: T201
        return status or 1

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        """Pass a signal on to the training, which saves; a second Ctrl-C ends all at once."""
        if number == signal.SIGINT and self.stopped == signal.SIGINT:
            for process in self.running.values():
                os.killpg(process.pid, signal.SIGKILL)
            return
        self.stopped = self.stopped or number
        train = self.running.get("stage_train")
        if train is not None:
            train.send_signal(number)
