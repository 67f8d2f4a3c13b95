"""What the C library does with memory that is freed."""

import ctypes
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # of mallopt(3)
BLOCK_BYTES = 1 << 21


def return_freed_blocks() -> None:
    """From here on a block of 2 MiB or more goes back to the system when it is freed.

    glibc else raises its threshold, up to 32 MiB, as blocks are freed, and holds on to those below it in a heap with
    holes. Where there is another C library nothing happens.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES)
