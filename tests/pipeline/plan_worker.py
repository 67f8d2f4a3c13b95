"""One rank of test_plan_memory: two training runs in turn, and the most memory that the second took, in bytes.

Usage: [torchrun ...] plan_worker.py JOBS.json, two lists of Hydra overrides. The first run is tiny: with it come
threads, libraries and caches that are no part of a plan. Memory is what the process has resident at its peak, less what
it had before the second run.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from shared.parallel import init_world, shutdown
from stage_train import config
from stage_train.job import Job

STATUS = Path("/proc/self/status")


def status(key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    world = init_world("cpu", 1)
    config.register()
    with initialize_config_module("conf", version_base="1.3"):
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            cfg: Any = OmegaConf.to_object(compose("train", overrides=overrides))
            Job([cfg], world).execute()
            peak = status("VmHWM") - before
    print(f"peak {peak} before {before}\n", end="", flush=True)  # noqa: T201
    shutdown()


if __name__ == "__main__":
    main()
