"""Searches for a concept's latents that are started from the page, each in a process of its own.

A regular expression of a few characters can take for ever on a text, and nothing within a process can end it. So the
search is a child: it is ended when somebody cancels it or the server ends, and it ends itself when the server is gone.
"""

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from shared.basics.disk import telling_disk_errors
from shared.basics.display import one_line
from shared.basics.errors import GranaryError
from shared.launch.spawned import without_script
from stage_inspect.concepts.question import Question

RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"
LOOK_SECONDS = 1.0  # between two looks of a child whether its parent is there
END_SECONDS = 3.0  # that a child is given to end before it is killed

KILLED = "the search was killed by signal {}, perhaps for lack of memory: look for fewer concepts at once"
BROKEN = "the search ended without a result: the terminal of granary explore says why"


@dataclass(frozen=True)
class Place:
    """A latents folder, with the dictionary and the store that it was made of; None: where the folder says."""

    latents: str
    sae: str | None = None
    store: str | None = None


@dataclass
class Progress:
    """How far a search is, as the page is told."""

    state: str = RUNNING
    tokens: int = 0
    """That were read."""
    total: int | None = None
    """To be read; None while everything is being opened."""
    error: str = ""
    concepts: list[str] = field(default_factory=list)
    """That were found."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Concepts that could not be looked for, and why."""


class Searching:
    """The searches in one latents folder: one at a time."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._process: SpawnProcess | None = None
        self._listener: threading.Thread | None = None

    def progress(self) -> dict[str, Any]:
        """Tell how far the search is that was started last; the state is none before the first."""
        with self._lock:
            return {"state": "none"} if self._progress is None else asdict(self._progress)

    def start(self, question: Question) -> dict[str, Any]:
        """Begin a search; raises GranaryError where one runs or no process can be had."""
        with self._lock:
            if self._progress is not None and self._progress.state == RUNNING:
                raise GranaryError("a search is running: wait for its end, or cancel it")
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_search, args=(theirs, self._place, question), daemon=True)
            try:
                with without_script():
                    process.start()
            except OSError as error:
                ours.close()
                raise GranaryError(f"no process can be had for the search: {error.strerror}") from error
            finally:
                theirs.close()  # else the end of the child would not close the pipe
            self._progress, self._process = Progress(), process
            self._listener = threading.Thread(target=self._listen, args=(ours, process, self._progress), daemon=True)
            self._listener.start()
        return self.progress()

    def cancel(self) -> dict[str, Any]:
        """End the search that runs, if one does, whatever it is doing."""
        with self._lock:
            process, listener = self._process, self._listener
            if self._progress is not None and self._progress.state == RUNNING:
                self._progress.state = CANCELLED
        if process is not None and listener is not None:
            for end in (process.terminate, process.kill):
                if listener.is_alive():
                    with suppress(ProcessLookupError):
                        end()
                    listener.join(END_SECONDS)
        return self.progress()

    def _listen(self, connection: Connection, process: SpawnProcess, progress: Progress) -> None:
        """Take what the child tells until it ends."""
        with connection, suppress(EOFError, OSError):
            while True:
                told = connection.recv()
                with self._lock:
                    if progress.state == RUNNING:
                        vars(progress).update(told)
        process.join()
        with self._lock:
            if progress.state == RUNNING:
                code = process.exitcode or 0
                progress.state, progress.error = FAILED, KILLED.format(-code) if code < 0 else BROKEN


def _search(connection: Connection, place: Place, question: Question) -> None:
    """The life of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too: the server ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its semaphores go with it; a long match looks for signals
    _end_with_parent()
    try:
        with telling_disk_errors():
            from stage_inspect.concepts.finding import Finding

            finding = Finding(place.latents, place.sae, place.store, question)
            connection.send({"total": finding.tokens})
            tokens = 0

            def tell(more: int) -> None:
                nonlocal tokens
                tokens += more
                connection.send({"tokens": tokens})

            found = finding.run(tell)
            finding.keep(found)
        connection.send({"state": DONE, "concepts": list(found.matches), "left_out": found.left_out})
    except GranaryError as error:
        connection.send({"state": FAILED, "error": one_line(error)})


def _end_with_parent() -> None:
    """A server that is killed by SIGKILL ends nobody. A timer looks for it: no thread runs beside a long match."""
    parent = multiprocessing.parent_process()

    def look(*_: object) -> None:
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)

    signal.signal(signal.SIGALRM, look)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
