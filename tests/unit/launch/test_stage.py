"""What a stage sets up before its task."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.launch.allocator import LARGE_PAGES, MALLOPT, as_environment
from tests.cli import environment

# The stage is asked for without the command's own module; its task makes a tensor of 256 MB, then many small ones.
STAGE = """
import resource
from pathlib import Path
from shared.launch.stage import run_stage
from stage_train.config import register

def task(cfg):
    import torch
    held = torch.ones(1 << 26)
    print(Path("/proc/self/smaps_rollup").read_text())
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(1 << 22) for _ in range(10)]
        del held
    print("faults:", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

register()
run_stage(task, "train")
"""
LINUX = Path("/sys/kernel/mm/transparent_hugepage/enabled")
UNSET = {name: value for name, value in environment().items() if name not in as_environment()}


def of_stage(pattern: str, folder: Path, variables: dict[str, str]) -> int:
    """The number that the stage's task tells of itself."""
    done = subprocess.run(
        [sys.executable, "-c", STAGE, "hydra.run.dir=."],
        cwd=folder, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (found,) = re.findall(pattern, done.stdout)
    return int(found)


def large_pages_kb(folder: Path, variables: dict[str, str]) -> int:
    """Kilobytes in pages of 2 MB of a stage with a tensor of 256 MB."""
    return of_stage(r"AnonHugePages: +(\d+) kB", folder, variables)


def faults(folder: Path, variables: dict[str, str]) -> int:
    """Of ten tensors of 16 MB, where as many were freed; pages are of 4 kB."""
    return of_stage(r"faults: (\d+)", folder, variables | dict.fromkeys(LARGE_PAGES, "0"))


@pytest.mark.skipif(
    not LINUX.exists() or "[madvise]" not in LINUX.read_text(), reason="asks where Linux gives them to who asks"
)
def test_tensors_lie_in_large_pages(tmp_path: Path) -> None:
    """Where the user's environment does not say otherwise."""
    assert large_pages_kb(tmp_path, UNSET) > 100 << 10
    assert large_pages_kb(tmp_path, UNSET | dict.fromkeys(LARGE_PAGES, "0")) < 100 << 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_memory_that_was_freed_is_taken_again(tmp_path: Path) -> None:
    """Where the user's environment does not say otherwise."""
    assert faults(tmp_path, UNSET) < 1000
    assert faults(tmp_path, UNSET | {"MALLOC_TRIM_THRESHOLD_": "131072"}) > 30_000
    assert faults(tmp_path, UNSET | {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}) > 30_000
    assert faults(tmp_path, UNSET | as_environment()) < 1000


def test_what_is_asked_for_has_the_number_and_the_name_of_malloc_h() -> None:
    header = Path("/usr/include/malloc.h")
    if not header.exists():
        pytest.skip("the headers of the C library are not here")
    for name, number in MALLOPT.items():
        assert re.search(rf"#define M_{name.upper()}\s+{number}\b", header.read_text())
