"""Inside a Slurm job that `hydra/launcher=slurm` submitted: a supervisor per node, which starts the stage as its child.

Slurm sends SIGUSR1 before the time limit and SIGTERM to pre-empt or to cancel, each to every process of the job. The
stage saves and ends; the supervisor outlives it, and puts the job back into the queue unless it was cancelled.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from shared.basics.errors import GranaryError

WARNING = signal.SIGUSR1
# submitit's own choice, SIGUSR2, would end the processes that do not know it.
CHOICE_OF_WARNING = {"SUBMITIT_PREEMPT_SIGNAL": "USR1"}
MARKER = "SUBMITIT_EXECUTOR"


def in_submitted_job() -> bool:
    """Whether this process is a supervisor."""
    return os.environ.get(MARKER) == "slurm"


def job_id() -> str:
    """The job as scontrol and squeue name it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def rendezvous() -> list[str]:
    """torchrun's arguments: one agent per node, which meet at the job's first node."""
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes == 1:
        return ["--standalone"]
    names = _output("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    address = re.search(r"NodeAddr=(\S+)", _output("scontrol", "--oneliner", "show", "node", names[0]))
    number = int(os.environ["SLURM_JOB_ID"])
    endpoint = f"{address[1] if address else names[0]}:{20000 + number % 20000}"
    return [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={number}"]


def supervise(command: Sequence[str]) -> None:
    """Run `command` to its end, requeueing the job when Slurm's warning comes; raises GranaryError when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != MARKER}
    process = subprocess.Popen(
        list(command), env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    for number in (WARNING, signal.SIGTERM):
        signal.signal(number, forward)
    last = _pass_on(process)
    status = process.wait()
    if received:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            _requeue_or_tell(warned=WARNING in received)
        sys.exit(128 + received[0])
    if status:
        why = last.removeprefix("error: ") or f"the stage ended with status {status}"
        raise GranaryError(f"Slurm job {job_id()} failed: {why}")


def _requeue_or_tell(*, warned: bool) -> None:
    """Put a job that was warned or is being pre-empted back into the queue; raises GranaryError for a cancelled one."""
    record = _output("scontrol", "--oneliner", "show", "job", job_id())
    preempted = re.search(r"\bPreemptTime=\d", record) is not None
    if warned or (preempted and "JobState=RUNNING" in record):  # else Slurm has requeued it already
        _output("scontrol", "requeue", job_id())
    elif not preempted:
        # An error is all that reaches the waiting command where Slurm keeps no accounts.
        raise GranaryError(f"Slurm job {job_id()} was cancelled; the same command again goes on from there")


def _pass_on(process: "subprocess.Popen[str]") -> str:
    """Copy the child's stderr to this one's; returns its last line that tells an error."""
    last = ""
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.startswith("error"):
            last = line.strip()
    return last


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise GranaryError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
