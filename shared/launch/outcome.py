"""How a command ends: its result, or one line on stderr and a status that says what kind of end it was.

0 done; 1 the thing looked at is damaged or incomplete; 2 a wrong input, or a disk that can't be written; 130 Ctrl-C.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from shared.basics.disk import describe, disk_fault
from shared.basics.display import one_line
from shared.basics.errors import GranaryError
from shared.launch.config_errors import describe_config_error

INTERRUPTED = 130


@contextmanager
def ending_in_one_line(on_interrupt: str | None = "run the same command again to continue") -> Iterator[None]:
    """Around all that a command does: what a user can mend becomes one line and a status; a bug keeps its traceback.

    What the command has printed is flushed here, so that a full disk behind ``> file`` is told as well; a reader who
    has closed the pipe (``| head``) has seen enough. `on_interrupt` is what Ctrl-C is answered; None: nothing.
    """
    try:
        yield
        sys.stdout.flush()
    except GranaryError as error:
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(describe_config_error(error))
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + 13)  # as the shell says of SIGPIPE
    except RecursionError as error:
        fail(f"the input is nested too deep: {error}")
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        _drop_output()
        fail(describe(fault))
    except KeyboardInterrupt:
        with suppress(OSError):
            if on_interrupt is not None:
                print(f"interrupted; {on_interrupt}", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)


def fail(message: str) -> NoReturn:
    """Print one line on stderr and exit with status 2."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(2)  # a fault all ranks share is told once: rank 0's exit makes torchrun end this one first
    where = f" (rank {rank})" if rank != "0" else ""
    with suppress(OSError):  # a stderr that can't be written either; the status says it
        print(f"error{where}: {one_line(message)}", file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(2)


def _drop_output() -> None:
    """Nobody takes what is still to be printed: Python would complain of that when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
