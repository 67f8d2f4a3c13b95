"""The peak of a process is its own."""

import subprocess
import sys

from tests.cli import environment

PEAK = "from shared.basics.memory import peak_memory; {} print(peak_memory())"


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
