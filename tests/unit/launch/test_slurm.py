"""The process behind a stage in a Slurm job, with a stand-in for scontrol; with the real Slurm: tests/cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.launch.overrides import expand_launcher
from tests.cli import REPOSITORY

SUPERVISOR = """
import sys
from shared.basics.errors import GranaryError
from shared.launch.slurm import in_submitted_job, supervise
assert in_submitted_job()
try:
    supervise([sys.executable, sys.argv[1]])
except GranaryError as error:
    print("told:", error)
"""
SAVING = """
import os, signal, sys, time
assert "SUBMITIT_EXECUTOR" not in os.environ
def save(number, frame):
    time.sleep(0.5)
    os.write(2, f"saved after {signal.Signals(number).name}\\n".encode())
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
os.write(2, b"ready\\n")  # unlike print, it may be interrupted by a handler that writes too
time.sleep(60)
"""


def start(folder: Path, script: str) -> "subprocess.Popen[str]":
    (folder / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$1" = requeue ]; then echo "$@" >> {folder}/called; else cat {folder}/record; fi\n'
    )
    (folder / "scontrol").chmod(0o755)
    (folder / "stage.py").write_text(script)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    command = [sys.executable, "-c", SUPERVISOR, str(folder / "stage.py")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


RUNNING = "JobId=15 JobState=RUNNING PreemptEligibleTime=2026-11-20T10:00:00 PreemptTime=None"
PREEMPTED = "JobId=15 JobState=RUNNING PreemptEligibleTime=2026-11-20T10:00:00 PreemptTime=2026-11-20T11:00:00"
CANCELLED = "JobId=15 JobState=COMPLETING PreemptTime=None"
REQUEUED = "JobId=15 JobState=COMPLETING PreemptTime=2026-11-20T11:00:00"
TOLD = "told: Slurm job 12_3 was cancelled; the same command again goes on from there\n"


@pytest.mark.parametrize(
    ("sent", "record", "requeued", "told"),
    [
        (signal.SIGUSR1, RUNNING, "requeue 12_3\n", ""),
        (signal.SIGTERM, PREEMPTED, "requeue 12_3\n", ""),
        (signal.SIGTERM, REQUEUED, "", ""),
        (signal.SIGTERM, CANCELLED, "", TOLD),
    ],
)
def test_the_stage_saves_before_the_job_is_requeued(
    tmp_path: Path, sent: signal.Signals, record: str, requeued: str, told: str
) -> None:
    (tmp_path / "record").write_text(record)
    with start(tmp_path, SAVING) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        begun = time.monotonic()
        process.send_signal(sent)
        out, rest = process.communicate(timeout=30)
        assert time.monotonic() - begun > 0.5
    assert rest == f"saved after {sent.name}\n"
    assert out == told
    assert process.returncode == (0 if told else 128 + sent)  # the supervisor of this test prints the error
    called = tmp_path / "called"
    assert (called.read_text() if called.exists() else "") == requeued


def test_what_the_stage_said_becomes_the_jobs_error(tmp_path: Path) -> None:
    with start(tmp_path, "from shared.launch.outcome import fail\nfail('the disk is full: free some')") as process:
        out, err = process.communicate(timeout=30)
    assert out == "told: Slurm job 12_3 failed: the disk is full: free some\n"
    assert err == "error: the disk is full: free some\n"
    with start(tmp_path, "raise SystemExit(7)") as process:
        assert process.communicate(timeout=30)[0] == "told: Slurm job 12_3 failed: the stage ended with status 7\n"


def test_naming_a_launcher_asks_for_a_multirun() -> None:
    assert expand_launcher(["hydra/launcher=slurm", "a=1"]) == ["--multirun", "hydra/launcher=slurm", "a=1"]
    assert expand_launcher(["-m", "hydra/launcher=slurm"]) == ["--multirun", "hydra/launcher=slurm"]
    assert expand_launcher(["a=1,2"]) == ["a=1,2"]
