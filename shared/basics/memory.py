"""The memory that this process has taken, and what the C library does with what is freed."""

import ctypes
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
BLOCK_BYTES, TRIM_BYTES = 1 << 21, 1 << 17
# glibc's highest for its own choice, and what it then keeps at the end of its heap.
OWN_BLOCK_BYTES, OWN_TRIM_BYTES = 1 << 25, 1 << 26
MOST_BYTES = (1 << 31) - 1


def return_freed_blocks() -> None:
    """Have the process give a block of 2 MiB or more back to the system when it is freed, from here on.

    glibc else raises its threshold, up to 32 MiB, as blocks are freed, and holds on to those below it in a heap with
    holes. Where there is another C library nothing happens.
    """
    _set_thresholds(mapped=BLOCK_BYTES, trimmed=TRIM_BYTES)


@contextmanager
def keeping_freed_blocks() -> Iterator[None]:
    """Have the process keep freed blocks of less than 32 MiB within the context, to be handed out again.

    A step of training frees what the next one needs, and memory that comes from the system is zeroed page by page at
    first touch. Larger blocks stay mappings of their own, as they are without this: a heap with holes of their size
    grew a run's peak by a seventh. Where there is another C library nothing happens.
    """
    _set_thresholds(mapped=OWN_BLOCK_BYTES, trimmed=MOST_BYTES)
    try:
        yield
    finally:
        _set_thresholds(mapped=OWN_BLOCK_BYTES, trimmed=OWN_TRIM_BYTES)
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set_thresholds(*, mapped: int, trimmed: int) -> None:
    """From how many bytes a block is a mapping of its own, and how many at the heap's end are given back."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, mapped)
        libc.mallopt(M_TRIM_THRESHOLD, trimmed)


def peak_memory() -> int:
    """The most bytes that this process has held so far.

    Not `ru_maxrss` where /proc tells it: that of a process begins at what the one that started it held.
    """
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
