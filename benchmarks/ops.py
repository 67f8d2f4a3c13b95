"""Each kernel operation alone: torch form and dense reference side by side on a CPU (on a GPU: benchmarks/gpu.py).

    python benchmarks/ops.py [--shape a] [--rounds 7] [--threads 2] [--record]
    python benchmarks/ops.py --quick

An operation is timed only after its result has been compared with the reference's on the same data. The two are called
in turn; medians are over rounds. The last line printed is one JSON object with the ratios.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records import RESULTS, Record, append, print_result, processor, quantiles
from step_providers import SHAPES, Shape, make_batch

from shared.kernels import (
    AdamStep,
    Compute,
    DeadRows,
    PairOrder,
    auxk_error,
    decode,
    dot_picks,
    encode_batchtopk,
    encode_threshold,
    encode_topk,
    row_grad,
    row_update,
)

Operation = Callable[[str], torch.Tensor]


def operations(shape: Shape) -> dict[str, Operation]:
    """Each takes the name of an implementation and returns a tensor to compare."""
    rng = torch.Generator().manual_seed(0)
    x = make_batch(shape)
    W = torch.nn.functional.normalize(torch.randn(shape.d_latent, shape.d_model, generator=rng), dim=1)
    b = torch.zeros(shape.d_latent)
    values, indices = encode_topk(x, W, b, shape.k, compute=Compute("torch"))
    threshold = float(values[:, -1].mean())
    order = PairOrder(indices, shape.d_latent)
    residual = torch.randn(x.shape, generator=rng)
    dead = [tensor[::64].clone().requires_grad_() for tensor in (W, b, W)]
    rows = DeadRows.alone(*dead)
    state = [W.clone(), torch.zeros_like(W), torch.zeros_like(W)]

    def update(kernels: str) -> torch.Tensor:
        adam = AdamStep(0.0, (0.9, 0.999), 1e-8, step=1, clip=torch.ones(()), unit_rows=True)
        row_update(state[0], W.clone(), state[1], state[2], adam, kernels=kernels)
        return state[0]

    def auxk(kernels: str) -> torch.Tensor:
        return torch.autograd.grad(auxk_error(residual, x, rows, shape.d_model // 2, compute=Compute(kernels)), dead)[0]

    return {
        "encode_topk": lambda kernels: encode_topk(x, W, b, shape.k, compute=Compute(kernels))[0],
        "encode_threshold": lambda kernels: encode_threshold(x, W, b, threshold, compute=Compute(kernels))[0],
        "encode_batchtopk": lambda kernels: encode_batchtopk(x, W, b, shape.k, compute=Compute(kernels))[0],
        "decode": lambda kernels: decode(values, indices, W, kernels=kernels),
        "dot_picks": lambda kernels: dot_picks(residual, indices, W, kernels=kernels),
        "row_grad": lambda kernels: row_grad(values, indices, x, shape.d_latent, order, kernels=kernels),
        "row_update": update,
        "auxk": auxk,
    }


def agrees(result: torch.Tensor, truth: torch.Tensor) -> bool:
    """Same numbers up to the rounding of sums; a pair near a threshold may be in one and not in the other."""
    width = min(result.shape[1], truth.shape[1])
    return float((result[:, :width] - truth[:, :width]).norm()) <= 1e-3 * float(truth.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds, within a minute")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = SHAPES["quick" if options.quick else options.shape]
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    records, ratios = [], {}
    print(f"{shape}, {options.threads} threads, {processor()}, torch {torch.__version__}; median of {rounds}, ms")
    for name, operation in operations(shape).items():
        if not agrees(operation("torch").clone(), operation("reference").clone()):
            raise SystemExit(f"error: {name} differs from its reference: not timed")
        times: dict[str, list[float]] = {"torch": [], "reference": []}
        for _ in range(rounds):
            for kernels, seconds in times.items():
                start = time.perf_counter()
                operation(kernels)
                seconds.append(time.perf_counter() - start)
        medians = {kernels: quantiles(seconds)[1] for kernels, seconds in times.items()}
        ratios[f"{name}: reference/torch"] = round(medians["reference"] / medians["torch"], 2)
        print(f"  {name:17s} torch {medians['torch'] * 1e3:9.1f}  reference {medians['reference'] * 1e3:9.1f}")
        records += [Record(name, kernels, str(shape), "float32", seconds, None) for kernels, seconds in times.items()]
    if options.record:
        append(records, processor(), options.threads, {})
    print_result({"shape": str(shape), "ratios": ratios})


if __name__ == "__main__":
    main()
