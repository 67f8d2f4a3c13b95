"""The memory that this process has taken, and what the C library does with what is freed."""

import ctypes
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of mallopt(3)
BLOCK_BYTES = 1 << 21
STATUS = Path("/proc/self/status")


def return_freed_blocks() -> None:
    """Have the process give a block of 2 MiB or more back to the system when it is freed, from here on.

    glibc else raises its threshold, up to 32 MiB, as blocks are freed, and holds on to those below it in a heap with
    holes. Where there is another C library nothing happens.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)


def peak_memory() -> int:
    """The most bytes that this process has held so far.

    Not `ru_maxrss` where /proc tells it: that of a process begins at what the one that started it held.
    """
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) counts bytes there, and kilobytes elsewhere
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
