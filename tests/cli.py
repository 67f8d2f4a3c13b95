"""Stages' real command lines in child processes that do not pay for the imports again.

A server process imports everything once and forks for each call: the child sees its own arguments, folder, standard
streams and exit status, as if started by a shell.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

REPOSITORY = Path(__file__).resolve().parent.parent

SERVER = """
import importlib, json, os, runpy, sys, traceback
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, path in ((1, call["stdout"]), (2, call["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.chdir(call["folder"])
        sys.argv = ["", *call["arguments"]]
        code = 0
        try:
            runpy.run_module(call["module"], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
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


class ForkServer:
    """A context manager; `run` is ``python -m module arguments...``."""

    def __init__(self, folder: Path, preload: list[str]) -> None:
        self.folder = folder
        self._out, self._err = folder / "stdout.txt", folder / "stderr.txt"
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(preload)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=folder,
            text=True,
        )
        assert self._reply() == "ready"

    def run(self, module: str, *arguments: str) -> Result:
        """Run a stage to its end."""
        self.start(module, *arguments)
        return self.finish()

    def start(self, module: str, *arguments: str) -> int:
        """Begin to run a stage; returns its process id. `finish` waits for it."""
        call = {"module": module, "arguments": arguments, "folder": str(self.folder)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**call, "stdout": str(self._out), "stderr": str(self._err)}) + "\n")
        self.process.stdin.flush()
        return int(self._reply())

    def finish(self) -> Result:
        """Wait for what was started."""
        code = int(self._reply())
        return Result(code, self._out.read_text(), self._err.read_text())

    def _reply(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
