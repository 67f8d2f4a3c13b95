"""What a training step does on a GPU, counted without one: launches, traffic beside the kernels, waits, memory.

    python benchmarks/gpu_counts.py [--shapes a b] [--kind topk] [--moments float32]
        [--quiet 64] [--verbose]

Tensors hold no data (``shared.kernels.fake_cuda``): any size is counted in seconds. BatchTopK reads on the host how
many pairs passed, so that its step cannot be followed. The last line is one JSON object.
"""

import argparse
import collections
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_stages.context import SHAPES
from gpu_stages.trainee import QUIET, make_trainee
from step_providers import Shape

from shared.kernels.fake_cuda import DEVICE, FakeCuda


def count(
    shape: Shape, kind: str = "topk", moments: str = "float32", quiet: int = QUIET
) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The step's figures, and (calls, bytes) of each operation beside the kernels and products."""
    with FakeCuda() as record:
        trainee = make_trainee(shape, DEVICE, kind=kind, moments=moments, quiet=quiet)
        x = torch.empty(shape.batch, shape.d_model, dtype=torch.bfloat16, device=DEVICE)
        trainee.step(x)  # the first makes what stays
        before = record.alive_bytes
        record.forget()
        trainee.step(x)
    by_name: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, size in record.operations:
        by_name[name][0] += 1
        by_name[name][1] += size
    products = ("aten.mm", "aten.addmm")
    beside = {name: (calls, size) for name, (calls, size) in by_name.items() if not name.startswith(products)}
    figures = {
        "shape": str(shape),
        "kind": kind,
        "moments": moments,
        "quiet": quiet,
        "kernel_launches": dict(collections.Counter(launch.kernel for launch in record.launches)),
        "other_operations": len(record.operations),
        "other_gb": sum(size for _, size in beside.values()) / 1e9,
        "syncs": record.syncs,
        "state_gb": before / 1e9,
        "above_state_gb": (record.peak_bytes - before) / 1e9,
        "contiguous": all(contiguous for launch in record.launches for _, _, contiguous in launch.tensors),
    }
    return figures, beside


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="*", default=["a", "b"], choices=list(SHAPES))
    parser.add_argument("--kind", default="topk", choices=("topk", "transcoder"))
    parser.add_argument("--moments", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quiet", type=int, nargs="*", default=[QUIET], help="one latent in so many is dead")
    parser.add_argument("--verbose", action="store_true", help="the operations beside the kernels, largest first")
    options = parser.parse_args()
    results = []
    for name, quiet in itertools.product(options.shapes, options.quiet):
        figures, beside = count(SHAPES[name], options.kind, options.moments, quiet)
        results.append(figures)
        for key, value in figures.items():
            print(f"{key}: {value}")
        if options.verbose:
            for operation, (calls, size) in sorted(beside.items(), key=lambda item: -item[1][1])[:20]:
                print(f"  {operation}: {calls} calls, {size / 1e9:.3f} GB")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
