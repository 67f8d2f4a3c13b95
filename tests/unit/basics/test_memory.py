"""The peak of a process is its own."""

import platform
import subprocess
import sys

import pytest

from tests.cli import environment

PEAK = "from shared.basics.memory import peak_memory; {} print(peak_memory())"

# Memory in MiB that a process holds at three moments: 24 blocks of 16 MiB freed within the context, the same taken
# and freed again, after the context; and the page faults of the second time.
KEPT = """
import mmap, re, resource
from pathlib import Path
from shared.basics.memory import keeping_freed_blocks

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

def take():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytearray(b'1') * (16 << 20) for _ in range(24)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_freed_blocks():
    first, kept, second, again = take(), resident(), take(), resident()
print(first, second, kept, again, resident())
"""


def test_a_process_begins_below_what_started_it() -> None:
    held = bytearray(1 << 28)
    held[:: 1 << 12] = b"1" * (1 << 16)  # each page
    small, large = (
        int(subprocess.run([sys.executable, "-c", PEAK.format(first)], env=environment(), capture_output=True,
                           check=True).stdout)
        for first in ("", "held = b'1' * (1 << 27);")
    )  # fmt: skip
    assert small < len(held)
    assert large >= small + (1 << 26)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_kept_for_the_next_step_and_returned_after_the_last() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], env=environment(), capture_output=True, check=True)
    first, second, kept, again, after = map(int, done.stdout.split())
    assert second * 100 < first  # none but odd ones
    assert kept > 24 * 16
    assert again < kept + 16
    assert after < kept - 23 * 16
