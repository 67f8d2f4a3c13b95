"""What a stage asks of the allocator, before its first tensor: pages of 2 MB, and that freed memory stays.

Linux clears memory as it maps it, 4 kB at a fault, and a step takes and gives back some hundred MB.
"""

import ctypes
import os

# PyTorch reads it at its first allocation: one fault for 512 of the usual ones. Where Linux lets no program ask for
# such pages it changes nothing.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
# glibc's parameters, as tunables and as numbers of mallopt(3). Blocks of up to 32 MB come from memory that was freed
# before: the most to which glibc would go by itself, since what is larger leaves holes. It keeps 256 MB, not 64.
KEPT = {"mmap_threshold": 32 << 20, "trim_threshold": 256 << 20}
MALLOPT = {"mmap_threshold": -3, "trim_threshold": -1}


def ask_for_memory() -> None:
    """Ask for both, unless the user's environment says otherwise."""
    for name, value in LARGE_PAGES.items():
        os.environ.setdefault(name, value)
    if is_chosen_by_user() or not hasattr(libc := ctypes.CDLL(None), "mallopt"):  # only glibc has it
        return
    for name, size in KEPT.items():
        libc.mallopt(MALLOPT[name], size)


def is_chosen_by_user() -> bool:
    """Whether the environment sets what glibc's allocator does: ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``, ..."""
    set_one_by_one = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    return set_one_by_one or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def as_environment() -> dict[str, str]:
    """The same for a process whose code does not ask: what its user would set."""
    return LARGE_PAGES | {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={size}" for name, size in KEPT.items())}
