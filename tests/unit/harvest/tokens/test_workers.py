"""The pool of processes: work in any order, and the death of a process at any moment as one line."""

import os
import signal
import time
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from stage_harvest.tokens.workers import WorkerPool
from tests.cli import ForkServer

BIG = "x" * 3_000_000  # more than a pipe holds

_argument = ""


def start(argument: str) -> None:
    global _argument
    _argument = argument


def work(number: int, seconds: float = 0.0) -> tuple[int, int]:
    time.sleep(seconds)
    if number < 0:
        raise ValueError(f"{number} is negative")
    return number, len(_argument)


SCRIPT = """
from stage_harvest.tokens.workers import WorkerPool

print("once")
pool = WorkerPool(1, str, "", len)
print(pool.submit("abc").result())
pool.close()
"""


def test_a_script_without_a_guard_is_not_run_again(stages: ForkServer, tmp_path: Path) -> None:
    """Python's own way would run it once more in each process, where it may not start processes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = stages.at(tmp_path).run(str(tmp_path / "script.py"))
    assert done.code == 0, done.stderr
    assert done.stdout.split() == ["once", "3"]


def test_results_by_task_and_what_the_work_raises() -> None:
    pool = WorkerPool(2, start, BIG, work)
    try:
        tasks = [pool.submit(number, 0.02 * (number % 2)) for number in range(9)]
        failing = pool.submit(-1)
        assert [task.result() for task in reversed(tasks)] == [(number, len(BIG)) for number in reversed(range(9))]
        with pytest.raises(ValueError, match="-1 is negative"):
            failing.result()
    finally:
        pool.close()
    assert not any(process.is_alive() for process in pool._processes)


@pytest.mark.parametrize("at", ["work", pytest.param("rest", marks=pytest.mark.slow)])
def test_a_process_killed_at_work_or_at_rest(at: str) -> None:
    pool = WorkerPool(2, start, BIG, work)
    try:
        tasks = [pool.submit(number, 5.0 if at == "work" else 0.0) for number in range(2)]
        if at == "rest":
            assert [task.result()[0] for task in tasks] == [0, 1]
        for process in pool._processes:
            os.kill(process.pid or 0, signal.SIGKILL)
        with pytest.raises(GranaryError, match="a tokenising process was killed"):
            (tasks[0] if at == "work" else pool.submit(1)).result()
    finally:
        pool.close()


def test_a_process_killed_as_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has read what its parent sends it: the parent must neither write nor wait for ever."""
    from multiprocessing.context import SpawnProcess

    begin = SpawnProcess.start

    def begin_and_die(process: SpawnProcess) -> None:
        begin(process)
        os.kill(process.pid or 0, signal.SIGKILL)

    monkeypatch.setattr(SpawnProcess, "start", begin_and_die)
    with pytest.raises(GranaryError, match="a tokenising process was killed"):
        WorkerPool(2, start, BIG, work)
