"""One rank of test_harvest_memory: load a trunk and print the most private memory that took, in bytes.

Usage: torchrun ... memory_worker.py MODEL NUM_LAYERS. Mapped pages of the weights' file, which the kernel can drop,
do not count; everything that was allocated does.
"""

import re
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from shared.lm import load_trunk

STATUS = Path("/proc/self/status")


def private_bytes() -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    peak = before = private_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    trunk = load_trunk(sys.argv[1], "bfloat16", num_layers=int(sys.argv[2]), tp_mesh=mesh["tp"])
    with torch.no_grad():
        trunk(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
    done.set()
    watcher.join()
    print(f"peak {peak - before}\n", end="", flush=True)  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
