"""Measure block sizes of the kernels on this GPU and keep the best.

    python benchmarks/tune.py [--shapes a b]        # minutes: most of them for compiling

Each kernel is run alone, at the width and size of each shape, with every candidate; the choices go into the file of
``shared/kernels/tuning.py``, where training finds them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_stages.context import SHAPES, Context
from step_providers import Shape, make_batch

from shared.kernels import AdamStep, Compute, PairOrder, decode, dot_picks, encode_topk, row_grad, tuning
from shared.kernels.pair_update import PairGradient

Median = Callable[[Callable[[], Any]], float]


def grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    """All combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def work(shape: Shape, device: str, kernels: str) -> Iterator[tuple[str, list[dict[str, int]], Callable[[], Any]]]:
    """(kernel's name, candidates, call that runs it)."""
    rng = torch.Generator(device=device).manual_seed(0)
    x = make_batch(shape, device)
    W = torch.randn(shape.d_latent, shape.d_model, device=device, generator=rng)
    b = torch.zeros(shape.d_latent, device=device)
    rounded, rows, options = [W.bfloat16()], x.bfloat16(), {"kernels": kernels}
    tiles = grid(WORKSPACE_MB=(16, 32, 64), BLOCK=(256, 512))
    yield "encode_topk", tiles, lambda: encode_topk(x, W, b, shape.k, compute=Compute(kernels, "bfloat16"))
    values, indices = encode_topk(x, W, b, shape.k, compute=Compute(kernels, "bfloat16"))
    order = PairOrder(indices, shape.d_latent)
    widths = tuple(width for width in (256, 512, 1024, 2048) if width <= max(256, shape.d_model))
    # Narrow columns too: those of all of W_dec may then stay in L2 from one token to the next.
    candidates = grid(BLOCK_D=(*widths, 128), num_warps=(1, 2, 4, 8))
    yield "decode", candidates, lambda: decode(values, indices, rounded[0], **options)
    candidates = grid(BLOCK_D=widths[:3], BLOCK_K=(4, 8, 16), num_warps=(2, 4, 8))
    candidates += grid(BLOCK_D=(128,), PART_D=(128, 256, 512), BLOCK_K=(8, 16, 32), num_warps=(2, 4))
    yield "dot_picks", candidates, lambda: dot_picks(rows, indices, rounded[0], **options)
    candidates = grid(BLOCK_D=widths[:3], BLOCK_P=(1, 2, 4, 8, 16), num_warps=(1, 2, 4, 8))
    yield "row_grad", candidates, lambda: row_grad(values, indices, rows, shape.d_latent, order, **options)
    rounded.clear()
    first, second, one = torch.zeros_like(W), torch.zeros_like(W), torch.ones((), device=device)
    gradient = PairGradient()

    def norm() -> None:
        gradient.clear()
        gradient.add(values, indices, order, rows)
        gradient.squared_norm(W, **options)

    yield "pair_norm", candidates, norm
    for unit in (False, True):

        def update(unit: bool = unit) -> None:
            gradient.clear()
            gradient.add(values, indices, order, rows)
            adam = AdamStep(1e-4, (0.9, 0.999), 1e-8, step=1, clip=one, unit_rows=unit)
            gradient.update(W, first, second, adam, **options)

        blocks = {} if unit else {"BLOCK_D": widths[:3]}
        yield f"pair_update unit_rows={unit}", grid(BLOCK_P=(1, 2, 4, 8), num_warps=(4, 8, 16), **blocks), update


def tune(shape: Shape, device: str, kernels: str, median: Median, keep: bool) -> None:
    """Print the best candidate of each kernel; with `keep`, save them for training."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    chosen: dict[str, dict[str, int]] = {}
    for kernel, candidates, call in work(shape, device, kernels):
        pairs = None if kernel in ("encode_topk", "row_grad") else shape.batch * shape.k
        name = tuning.key(kernel, shape.d_model, pairs)
        times = []
        for candidate in candidates if keep else candidates[:1]:
            with tuning.trial({name: candidate}):
                try:
                    times.append((median(call), json.dumps(candidate)))
                except Exception as error:  # does not fit in registers or shared memory: no candidate
                    print(f"{name} {candidate}: {type(error).__name__}")
        if times:
            best = min(times)
            chosen[name] = json.loads(best[1])
            print(f"{name}: {best[1]} {best[0]:.3f} ms (slowest {max(times)[0]:.3f})", flush=True)
    if keep:
        print(f"tuned block sizes are in {tuning.save(gpu, chosen)}")


def main() -> None:
    """Tune for every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="*", default=["a"], choices=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here")
    context = Context("tune", Path.cwd(), rehearse=False)
    for name in options.shapes:
        tune(SHAPES[name], context.device, context.kernels, context.milliseconds, keep=True)


if __name__ == "__main__":
    main()
