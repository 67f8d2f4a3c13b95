"""Processes of a job end with the one that started them, be it by SIGKILL: nothing trains on unseen."""

import ctypes
import os
import signal
import sys

# Process id of the starter, for the processes that it starts.
STARTER = "GRANARY_STARTER"
PR_SET_PDEATHSIG = 1


def environment_of_child() -> dict[str, str]:
    """This process's environment, naming it as the starter."""
    return {**os.environ, STARTER: str(os.getpid())}


def end_with_starter() -> None:
    """Have the kernel send SIGTERM, upon which training saves, when the starter ends (Linux; elsewhere nothing)."""
    starter = os.environ.get(STARTER)
    if starter is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(starter):  # it ended before the call
        os.kill(os.getpid(), signal.SIGTERM)
