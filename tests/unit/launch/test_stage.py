"""What a stage sets up before its task."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.launch.stage import LARGE_PAGES
from tests.cli import environment

# The stage is asked for without the command's own module; its task makes a tensor of 256 MB.
STAGE = """
from pathlib import Path
from shared.launch.stage import run_stage
from stage_train.config import register

def task(cfg):
    import torch
    held = torch.ones(1 << 26)
    print(Path("/proc/self/smaps_rollup").read_text())

register()
run_stage(task, "train")
"""
LINUX = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large_pages_kb(folder: Path, variables: dict[str, str]) -> int:
    """Kilobytes in pages of 2 MB of a stage with a tensor of 256 MB."""
    done = subprocess.run(
        [sys.executable, "-c", STAGE, "hydra.run.dir=."],
        cwd=folder, env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (found,) = re.findall(r"AnonHugePages: +(\d+) kB", done.stdout)
    return int(found)


@pytest.mark.skipif(
    not LINUX.exists() or "[madvise]" not in LINUX.read_text(), reason="asks where Linux gives them to who asks"
)
def test_tensors_lie_in_large_pages(tmp_path: Path) -> None:
    """Where the user's environment does not say otherwise."""
    unset = {name: value for name, value in environment().items() if name not in LARGE_PAGES}
    assert large_pages_kb(tmp_path, unset) > 100 << 10
    assert large_pages_kb(tmp_path, unset | dict.fromkeys(LARGE_PAGES, "0")) < 100 << 10
