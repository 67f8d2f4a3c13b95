"""What matters of this machine for the other benchmarks: instructions, cores, bandwidths, rates of matrix products.

    python benchmarks/machine.py            # about a minute
    python benchmarks/machine.py --quick    # seconds, for a first look

Memory is copied, not read; the disk is that of --folder: written with fsync, and read after its pages were dropped from
the cache. Rates are the best of several, on --threads threads. The last line is one JSON object, whose ``class`` is
what every benchmark's last line carries.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import machine_class, print_result

# The encoder's product at d_model 512 with 16,384 latents, and a quarter of its rows.
ROWS, QUICK_ROWS, WIDTH, LATENTS = 4096, 1024, 512, 16384


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products(rows: int, repeats: int) -> dict[str, float]:
    """GFLOP/s of ``x W^T + b`` by each library and type that this torch has here."""
    x, W, b = torch.randn(rows, WIDTH), torch.randn(LATENTS, WIDTH), torch.zeros(LATENTS)
    ways = {"F.linear float32": lambda: torch.nn.functional.linear(x, W, b)}
    if torch.backends.mkldnn.is_available():
        pointwise = torch.ops.mkldnn._linear_pointwise
        ways["oneDNN float32"] = lambda: pointwise(x, W, b, "none", [], "")
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            x16, W16, b16 = x.bfloat16(), W.bfloat16(), b.bfloat16()
            ways["oneDNN bfloat16"] = lambda: pointwise(x16, W16, b16, "none", [], "")
    flop = 2 * rows * WIDTH * LATENTS
    return {name: round(flop / best(way, repeats) / 1e9, 1) for name, way in ways.items()}


def memory(megabytes: int, repeats: int) -> dict[str, float]:
    """GB/s of a copy, counting what is read and written, into memory that exists and into memory that is made."""
    source = torch.ones(megabytes << 18)
    target, size = torch.empty_like(source), 2 * 4 * source.numel()
    found = {"copy": lambda: target.copy_(source), "copy into fresh memory": source.clone}
    return {name: round(size / best(run, repeats) / 1e9, 2) for name, run in found.items()}


def disk(folder: Path, megabytes: int, repeats: int) -> dict[str, float]:
    """GB/s of writing a file to the disk, and of reading it from there."""
    block = os.urandom(1 << 20) * 16
    path = folder / "block"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(megabytes >> 4):
                file.write(block)
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.readinto(buffer):
                pass

    buffer = bytearray(len(block))
    size = (megabytes >> 4) * len(block)
    return {name: round(size / best(run, repeats) / 1e9, 3) for name, run in {"write": write, "read": read}.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="on the disk to measure; one for temporary files else")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats, megabytes = (2, 128) if options.quick else (7, 1024)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found: dict[str, Any] = {
            "threads": options.threads,
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gflop_per_s": products(QUICK_ROWS if options.quick else ROWS, repeats),
            "memory_gb_per_s": memory(megabytes, repeats),
            "disk_gb_per_s": disk(Path(folder), megabytes, repeats),
            "torch": torch.__version__,
        }
    print(machine_class())
    for name, value in found.items():
        print(f"  {name:16s} {json.dumps(value)}")
    print_result(found)


if __name__ == "__main__":
    main()
