"""The peak of a process is its own."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shared.basics import memory
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


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_proc_the_unit_is_the_systems(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    monkeypatch.setattr(sys, "platform", platform)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = memory.peak_memory()
    assert unit * before <= found <= unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
