"""Processes that each run the tokenizer on one core, one batch at a time.

A pipe per process and no lock that two of them share: one that is killed, at whatever moment, its start included, takes
nothing along, and the parent sees its pipe close.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from shared.basics.errors import GranaryError
from shared.launch.spawned import without_script

Result = TypeVar("Result")
END_SECONDS = 5.0  # that a process is given to end before it is killed

GONE = "a tokenising process was killed, perhaps for lack of memory: run again with fewer tokenise_workers"


class Task(Generic[Result]):
    """Work given to a pool: `result` waits for it."""

    def __init__(self, pool: "WorkerPool") -> None:
        self._pool = pool
        self._outcome: list[Result | BaseException] = []

    def finish(self, outcome: Result | BaseException) -> None:
        self._outcome.append(outcome)

    def result(self) -> Result:
        """What the work gave; raises what it raised, or GranaryError where its process is gone."""
        while not self._outcome:
            self._pool.collect()
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class WorkerPool:
    """`size` processes that call `work` on what they are given, after ``start(argument)`` in each."""

    def __init__(self, size: int, start: Callable[[Any], None], argument: Any, work: Callable[..., Any]) -> None:
        """Raises GranaryError where a process is gone before it has begun."""
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, Task[Any]] = {}
        try:
            for _ in range(size):
                ours, theirs = context.Pipe()
                # What a process is started with must be small: its parent would write for ever to one that is killed
                # before it has read all of it. So the argument follows by our own pipe.
                process = context.Process(target=_serve, args=(theirs, start, work), daemon=True)
                self._processes.append(process)
                with without_script():
                    process.start()
                theirs.close()  # else the end of the process would not close the pipe
                self._idle.append(ours)
            for connection in self._idle:
                connection.send(argument)
        except OSError as error:
            self.close()
            raise GranaryError(GONE) from error

    def submit(self, *arguments: Any) -> Task[Any]:
        """Give work to an idle process, waiting for one; raises GranaryError where a process is gone."""
        while not self._idle:
            self.collect()
        connection = self._idle.pop()
        task: Task[Any] = Task(self)
        try:
            connection.send(arguments)
        except OSError as error:
            raise GranaryError(GONE) from error
        self._busy[connection] = task
        return task

    def collect(self) -> None:
        """Wait until a process has finished, and keep what it gave; raises GranaryError where one is gone."""
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                outcome = connection.recv()
            except (EOFError, OSError) as error:
                raise GranaryError(GONE) from error
            self._busy.pop(connection).finish(outcome)
            self._idle.append(connection)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for connection in [*self._idle, *self._busy]:
            connection.close()
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(connection: Connection, start: Callable[[Any], None], work: Callable[..., Any]) -> None:
    """The life of a process: it ends when its parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        start(connection.recv())
    except (EOFError, OSError):
        return
    while True:
        try:
            arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            outcome = work(*arguments)
        except Exception as error:
            outcome = error
        connection.send(outcome)


def _end_with_parent() -> None:
    """A parent killed by SIGKILL closes nothing that its workers would notice."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
