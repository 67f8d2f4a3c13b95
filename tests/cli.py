"""Stages' real command lines in child processes that do not pay for the imports again.

A server process imports everything once and forks for each call: the child sees its own arguments, folder, standard
streams and exit status, as if started by a shell. Several may run at once. All workers of a session have one server.
"""

import copy
import fcntl
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

REPOSITORY = Path(__file__).resolve().parent.parent
# What the three stages import before they begin to work.
STAGES = (
    "shared.launch.stage",
    "stage_harvest.entry",
    "stage_train.job",
    "stage_eval.evaluate",
    "stage_inspect.inspect",
    "stage_trace.job",
    "transformers.models.llama.modeling_llama",
    "tests.stages_ready",
)

# A call's child is forked by a process that does nothing but wait for it, and writes down how it ended. The server ends
# when all processes that called it have said so or are gone.
SERVER = """
import atexit, gc, importlib, json, os, runpy, socket, sys, traceback
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a child's collector would write to every page of what was imported, and copy it
users = {int(sys.argv[3])}
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen()
listener.settimeout(1)

def run(call):
    if call["session"]:
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(f"{call['files']}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.path += [os.environ["PYTHONPATH"]]
    sys.argv = ["", *call["arguments"]]
    code = 0
    try:
        if call["module"].endswith(".py"):
            runpy.run_path(call["module"], run_name="__main__")
        else:
            runpy.run_module(call["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # as at the end of a process of its own
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

def alive(user):
    try:
        os.kill(user, 0)
    except ProcessLookupError:
        return False
    return True

while users:
    reap()
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        users = {user for user in users if alive(user)}
        continue
    with connection, connection.makefile("rw") as stream:
        call = json.loads(stream.readline())
        users.add(call["user"])
        if call.get("leaves"):
            users.remove(call["user"])
            if not users:
                os.unlink(sys.argv[2])  # before the answer: whoever comes next starts another
        if "leaves" in call:
            continue
        if os.fork():
            continue
        listener.close()
        child = os.fork()
        if child == 0:
            stream.close()
            connection.close()
            run(call)
        print(child, file=stream)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{call['files']}.tmp", "w") as file:
        file.write(str(code))
    os.rename(f"{call['files']}.tmp", f"{call['files']}.code")
    os._exit(0)
if os.path.exists(sys.argv[2]):
    os.unlink(sys.argv[2])
"""


@dataclass(frozen=True)
class Result:
    """What a command line left."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line of a refused command; fails the test when there is more, or the status is not 2."""
        lines = self.stderr.splitlines()
        assert self.code == 2, f"status {self.code}: {self.stderr}"
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: "), lines[0]
        return lines[0].removeprefix("error: ")


@dataclass(frozen=True)
class Child:
    """A running command, with the methods of subprocess.Popen that tests use."""

    pid: int
    files: Path

    @property
    def errors(self) -> str:
        """What it has written to its standard error so far."""
        return self.files.with_suffix(".2").read_text()

    @property
    def output(self) -> str:
        """What it has written to its standard output so far."""
        file = self.files.with_suffix(".1")
        return file.read_text() if file.exists() else ""  # it may not have begun

    def poll(self) -> int | None:
        """The exit status, minus the signal's number after a signal; None while it runs."""
        code = self.files.with_suffix(".code")
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout: float = 280) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running: {self.errors}"
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and how is not written down yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def finish(self, timeout: float = 280) -> Result:
        """Wait for the end; one that does not come in time fails the test and ends the process."""
        try:
            code = self.wait(timeout)
        finally:
            self.kill()
        return Result(code, self.output, self.errors)


class ForkServer:
    """A context manager; `run` is ``python -m module arguments...`` in `folder`."""

    def __init__(self, folder: Path, address: Path, preload: Iterable[str], library: Path | None = None) -> None:
        """The server at `address` in the file system, started where there is none.

        `preload` are modules; `library` is a shared object that comes before libc, in the commands too.
        """
        self.folder, self.library, self._address = folder, library, address
        self._calls = folder / "calls"
        self._calls.mkdir()
        self._numbers, self._children = itertools.count(), list[Child]()
        with self._locked():
            if not address.exists():
                self._start_server(preload, library)
            self._ask({"leaves": False})  # it stays for us, even if its starter ends before our first call

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """No other worker starts the server or leaves it meanwhile."""
        with self._address.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _start_server(self, preload: Iterable[str], library: Path | None) -> None:
        """Returns when it answers."""
        arguments = [sys.executable, "-c", SERVER, json.dumps(list(preload)), str(self._address), str(os.getpid())]
        variables = environment() | ({} if library is None else {"LD_PRELOAD": str(library)})
        # No Popen, which would warn of a process that outlives this one; and xdist speaks through this one's stdout.
        silent = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1)]
        server = os.posix_spawn(sys.executable, arguments, variables, file_actions=silent)
        while not self._address.exists():
            assert os.waitpid(server, os.WNOHANG) == (0, 0), "the server ended before it answered"
            time.sleep(0.02)

    def at(self, folder: Path) -> Self:
        """The same server, whose commands run in another folder."""
        other = copy.copy(self)
        other.folder = folder
        return other

    def run(self, module: str, *arguments: str) -> Result:
        """Run a stage to its end."""
        return self.start(module, *arguments).finish()

    def start(
        self, module: str, *arguments: str, session: bool = False, variables: Mapping[str, str] | None = None
    ) -> Child:
        """Begin to run a stage, or a script by its path ending in .py; with `session` in a process group of its own.

        `variables` are put into its environment.
        """
        call = {"module": module, "arguments": arguments, "folder": str(self.folder), "session": session}
        files = self._calls / str(next(self._numbers))
        call |= {"files": str(files), "environment": environment() | dict(variables or {})}
        child = Child(int(self._ask(call)), files)
        self._children.append(child)
        return child

    def ranks(self, size: int, module: str, *arguments: str) -> list[Result]:
        """Run a module or script in processes that meet as torchrun's do, to their ends; one that fails ends all."""
        from torch.distributed import TCPStore  # here: processes that the tests spawn import this module

        meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        variables |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        children = [
            self.start(module, *arguments, variables={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)
        ]
        while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
            time.sleep(0.02)
        if any(child.poll() for child in children):
            for child in children:
                child.kill()
        return [child.finish() for child in children]

    def _ask(self, call: Mapping[str, object]) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            deadline = time.monotonic() + 10
            while connection.connect_ex(str(self._address)):  # it is about to listen
                assert time.monotonic() < deadline, "the server is gone"
                time.sleep(0.01)
            with connection.makefile("rw") as stream:
                print(json.dumps({**call, "user": os.getpid()}), file=stream, flush=True)
                return stream.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.kill()
        with self._locked():
            self._ask({"leaves": True})


def environment() -> dict[str, str]:
    """The test's own, in which stages are found, use one thread and no network."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
