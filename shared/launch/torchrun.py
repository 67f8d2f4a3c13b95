"""torchrun with quiet failures: ``python -m shared.launch.torchrun --nproc-per-node 8 -m stage_train key=value``.

Takes torchrun's own arguments. When a rank fails, its one-line message is all the user sees, and its exit status is
the job's. SIGTERM and SIGUSR1 (Slurm's pre-emption) are passed on to the ranks, which then have two minutes to save.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main as torchrun

from shared.launch.orphans import end_with_starter, environment_of_child


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun; returns the exit status of the first rank that failed, 128 + n after signal n, or 0."""
    end_with_starter()
    os.environ.update(environment_of_child())
    # torchrun would pin every rank to one thread: share this node's cores among its ranks instead.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(arguments)))
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    if option(arguments, "nnodes") not in (None, "1"):
        meeting = f"for {option(arguments, 'nnodes')} machines to meet at {option(arguments, 'rdzv-endpoint')}"
        print(f"waiting   {meeting}", file=sys.stderr, flush=True)  # noqa: T201
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # that rank has said why
        tell_killed(rank, -failure.exitcode)
        return 128 - failure.exitcode
    except SignalException as signalled:
        return 128 + signalled.sigval
    except RendezvousError:
        what = "the rendezvous can't be reached: its machine may be gone; run the same command again to continue"
        print(f"\nerror: {what}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    return 0


def tell_killed(rank: int, number: int) -> None:
    """One line for a rank that could not tell its end itself."""
    name = signal.Signals(number).name
    why = " (for lack of memory?)" if number == signal.SIGKILL else ""
    print(  # noqa: T201
        f"\nerror: rank {rank} was killed by {name}{why}; run the same command again to continue",  # below its bar
        file=sys.stderr,
        flush=True,
    )


def threads_per_rank(arguments: Sequence[str]) -> int:
    """Cores of this node divided by the ranks torchrun will start on it, at least 1."""
    ranks = option(arguments, "nproc-per-node")
    if ranks is None:
        return os.cpu_count() or 1
    return max(1, (os.cpu_count() or 1) // int(ranks)) if ranks.isdecimal() else 1


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of torchrun's option `name`, which may be written with hyphens or underscores; None if not given."""
    for position, argument in enumerate(arguments):
        given, equals, value = argument.partition("=")
        if given.startswith("--") and given[2:].replace("_", "-") == name:
            return value if equals else arguments[position + 1]
    return None


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
