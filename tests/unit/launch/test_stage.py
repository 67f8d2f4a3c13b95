"""What a stage sets up before its task."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.launch.allocator import MALLOPT, as_environment, is_chosen_by_user
from tests.cli import environment

# The stage is asked for without the command's own module; its task makes a tensor of 256 MB, then many of 16.
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


def memory_of_stage(folder: Path, variables: dict[str, str]) -> tuple[int, int]:
    """Kilobytes in pages of 2 MB while a tensor of 256 MB is held; faults of ten of 16 MB where as many were freed."""
    done = subprocess.run(
        [sys.executable, "-c", STAGE, "hydra.run.dir=."],
        cwd=folder, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (large_kb,), (faults,) = (re.findall(f"{name}: +(\\d+)", done.stdout) for name in ("AnonHugePages", "faults"))
    return int(large_kb), int(faults)


@pytest.mark.skipif(
    not LINUX.exists() or "[madvise]" not in LINUX.read_text(), reason="asks where Linux gives them to who asks"
)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_tensors_lie_in_large_pages_and_in_memory_that_was_freed(tmp_path: Path) -> None:
    """Where the user's environment does not say otherwise."""
    large_kb, faults = memory_of_stage(tmp_path, UNSET)
    assert large_kb > 100 << 10
    assert faults < 5000  # some hundred; 2,600 with a build of PyTorch for CUDA, which reads more of itself in
    otherwise = {"THP_MEM_ALLOC_ENABLE": "0", "MALLOC_TRIM_THRESHOLD_": "131072"}
    large_kb, faults = memory_of_stage(tmp_path, UNSET | otherwise)
    assert large_kb < 100 << 10
    assert faults > 30_000


@pytest.mark.parametrize(
    ("variables", "is_chosen"),
    [
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, True),
        ({"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2:glibc.malloc.trim_threshold=131072"}, True),
        (as_environment(), True),
        ({"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2", "MALLOC_ARENA_MAX": "2"}, False),
    ],
)
def test_a_choice_of_the_environment_is_seen(
    variables: dict[str, str], is_chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what glibc does with freed memory; another of its settings is none."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_chosen_by_user() == is_chosen


def test_what_is_asked_for_has_the_number_and_the_name_of_malloc_h() -> None:
    header = Path("/usr/include/malloc.h")
    if not header.exists():
        pytest.skip("the headers of the C library are not here")
    for name, number in MALLOPT.items():
        assert re.search(rf"#define M_{name.upper()}\s+{number}\b", header.read_text())
