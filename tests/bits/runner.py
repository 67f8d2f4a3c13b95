"""Runs the matrix with the code of one source tree; what is done already is not done again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.bits.matrix import STAGES, Case

PACKAGES = ("shared", "stage_harvest", "stage_train", "stage_eval", "stage_trace")
SECONDS = 900  # a case takes a few, on a machine with nothing else to do
STOP_AFTER = 200
"""Lines of metrics, one a step, after which a run is stopped."""
# One thread: a sum whose parts are shared out among threads depends on how many there are.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TQDM_DISABLE": "1",
}


class CaseFailedError(Exception):
    """A command did not end as it should; the message is its last line."""


@dataclass
class Side:
    """One source tree, and the folder in which its commands run."""

    label: str
    tree: Path
    folder: Path
    running: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def check(self) -> None:
        """Raise RuntimeError unless it is this tree's packages that are imported: the venv knows another tree's.

        Those that an older tree does not have are not asked for.
        """
        names = [name for name in PACKAGES if (self.tree / name).is_dir()]
        code = f"import importlib; print(*(importlib.import_module(name).__file__ for name in {names!r}), sep='\\n')"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=self._environment(), check=True, capture_output=True
        )
        for path in found.stdout.decode().splitlines():
            if not Path(path).is_relative_to(self.tree):
                raise RuntimeError(f"{self.label}: {path} is imported, which is not in {self.tree}")

    def run(self, cases: Sequence[Case], jobs: int, tell: Callable[[str], None]) -> dict[str, str]:
        """Run all cases, those of a stage side by side; returns what went wrong, by name of the case."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        failed: dict[str, str] = {}

        def one(case: Case) -> None:
            missing = [name for name in case.needs if name in failed]
            begun = time.monotonic()
            try:
                if missing:
                    raise CaseFailedError(f"it needs {', '.join(missing)}, which failed")
                if not self._is_done(case):
                    self._execute(case)
                    tell(f"{self.label:5} {case.name:24} {time.monotonic() - begun:5.1f} s")
            except CaseFailedError as error:
                failed[case.name] = str(error)
                tell(f"{self.label:5} {case.name:24} failed: {error}")

        for stage in STAGES:
            with ThreadPoolExecutor(jobs) as pool:
                try:
                    list(pool.map(one, [case for case in cases if case.stage == stage]))
                except BaseException:  # Ctrl-C: the commands, each a session of its own, are not told by the terminal
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in self.running:
                        process.kill()
                    raise
        return failed

    def _is_done(self, case: Case) -> bool:
        return (self.folder / "done" / case.name).is_file()

    def _execute(self, case: Case) -> None:
        shutil.rmtree(self.folder / case.name, ignore_errors=True)  # of an attempt that failed
        if case.stopped:
            self._stop_midway(case)
        self._finish(case, self._start(case))
        stamp = self.folder / "done" / case.name
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()

    def _start(self, case: Case) -> "subprocess.Popen[bytes]":
        with self._log(case).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *case.command()],
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _finish(self, case: Case, process: "subprocess.Popen[bytes]", saved: Sequence[int] = (0,)) -> None:
        """Wait; raises CaseFailedError for a status other than those `saved`."""
        self.running.append(process)
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks end with it
            raise CaseFailedError(f"not done after {SECONDS} s") from None
        finally:
            self.running.remove(process)
        if status not in saved:
            lines = self._log(case).read_text(errors="replace").strip().splitlines() or [f"status {status}"]
            told = [line for line in lines if line.startswith("error")] or lines
            raise CaseFailedError(f"{told[-1]} (--keep FOLDER leaves its whole log in FOLDER/{self.label}/logs)")

    def _stop_midway(self, case: Case) -> None:
        """SIGTERM after ``STOP_AFTER`` steps or a few more."""
        process = self._start(case)
        metrics = self.folder / case.name / "sae" / "metrics.jsonl"
        deadline = time.monotonic() + SECONDS
        while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < STOP_AFTER:
            if process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        self._finish(case, process, saved=(0, 128 + signal.SIGTERM))  # 0 in earlier versions
        if (metrics.parent / "sae.safetensors").exists():
            raise CaseFailedError("the run was over before it was stopped")

    def _log(self, case: Case) -> Path:
        path = self.folder / "logs" / f"{case.name}.log"
        path.parent.mkdir(exist_ok=True)
        return path

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRANARY", "HYDRA"))
        }
        return {**kept, **ENVIRONMENT, "PYTHONPATH": str(self.tree)}
