"""The sparse step on a GPU: step time, its parts, peak memory and tokens/s against three yardsticks.

    make bench-gpu                                  # tune, test, measure; writes benchmarks/gpu.md and results.csv
    python benchmarks/gpu.py --shapes 262144,128,8192 --skip-tuning
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run    # every code path at a tiny size on a CPU

Yardsticks: the floor, 2 N F d / the bfloat16 rate measured here on a large square product; a dense torch step in bf16
autocast; this project with kernels=reference under torch.compile. bf16 products, float32 masters and
moments, AuxK active on F / 64 quiet latents, clipping, projection, exact Adam. A yardstick that does not fit in memory
is reported so. Medians over steps timed with CUDA events.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records import Record, append, quantiles
from step_providers import Shape, make_batch

from shared.kernels import AdamStep, Compute, PairOrder, decode, dot_picks, encode_topk, sort_pairs
from shared.kernels.pair_update import PairGradient
from shared.sae import SAE, AdamConfig, DeadLatents, SAEConfig, make_optimiser

TABLE = Path(__file__).resolve().parent / "gpu.md"
D_MODEL = 4096
LATENTS, KS, BATCHES = (131072, 262144), (64, 128), (8192, 16384, 32768)
DRY_SHAPES = [Shape(32, 128, 4, 8)]
GOALS = (
    "step <= 2 x floor at N=8192, <= 1.5 x at N=32768; memory <= weights + moments + 6 GB; "
    "more than 150,000 tokens/s at F=262144, k=128"
)


class Clock:
    """Milliseconds of a call, on the device where there is one."""

    def __init__(self, device: str, repeats: int) -> None:
        self.cuda, self.repeats = device == "cuda", repeats

    def times(self, call: Callable[[], Any]) -> list[float]:
        """Each of `repeats` calls after two that are not counted."""
        for _ in range(2):
            call()
        return [self._one(call) for _ in range(self.repeats)]

    def median(self, call: Callable[[], Any]) -> float:
        return quantiles(self.times(call))[1]

    def _one(self, call: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))


def peak_flops(device: str, size: int, clock: Clock) -> float:
    """bfloat16 multiply-adds x 2 per second of a square product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (clock.median(lambda: a @ b) * 1e-3)


def make_sae(shape: Shape, device: str, kernels: str) -> tuple[SAE, torch.Tensor]:
    """An initialised SAE and the indices of its quiet latents, which count as dead."""
    config = SAEConfig(d_model=shape.d_model, d_latent=shape.d_latent, k=shape.k)
    with torch.device(device):
        sae = SAE(config, kernels=kernels, compute_dtype="bfloat16")
    sae.initialise(None, make_batch(Shape(shape.d_model, shape.d_latent, shape.k, min(512, shape.batch)), device))
    dead_R = torch.arange(0, shape.d_latent, 64, device=device)
    with torch.no_grad():
        sae.W_enc[dead_R] *= 0.1
    return sae, dead_R


def our_step(shape: Shape, device: str, kernels: str, compiled: bool = False) -> Callable[[], None]:
    """The whole recipe; `compiled` puts losses and backward under torch.compile."""
    sae, dead_R = make_sae(shape, device, kernels)
    optimiser = make_optimiser(sae, AdamConfig(lr=1e-4), pair_gradients=not compiled)
    tracker = DeadLatents(shape.d_latent, sae.config.dead_after_tokens, device=device)
    x = make_batch(shape, device)
    torch.compiler.reset()  # else earlier shapes use up the recompilations, and this one runs eagerly
    losses_of = torch.compile(sae.losses) if compiled else sae.losses

    def step() -> None:
        torch.set_float32_matmul_precision("high" if compiled else "highest")  # TF32 for the reference's products
        losses = losses_of(x, dead_R)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        tracker.update(losses.fired, shape.batch)

    return step


def dense_step(shape: Shape, device: str) -> Callable[[], None]:
    """Dense PyTorch in bfloat16 autocast, fused Adam, projection; no AuxK."""
    W_dec = torch.nn.Parameter(F.normalize(torch.randn(shape.d_latent, shape.d_model, device=device), dim=1))
    W_enc = torch.nn.Parameter(W_dec.detach().clone())
    b_enc, b_dec = (torch.nn.Parameter(torch.zeros(n, device=device)) for n in (shape.d_latent, shape.d_model))
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimiser = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    x = make_batch(shape, device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            z = torch.relu(F.linear(x - b_dec, W_enc, b_enc))
            values, indices = z.topk(shape.k)
            x_hat = torch.zeros_like(z).scatter(1, indices, values) @ W_dec + b_dec
        loss = (x_hat - x).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            assert W_dec.grad is not None
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            optimiser.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    return step


def parts(shape: Shape, device: str, kernels: str, clock: Clock) -> Iterator[tuple[str, list[float]]]:
    """(operation, milliseconds) of the step's parts, each alone."""
    sae, _ = make_sae(shape, device, kernels)
    W_enc, W_dec, b_enc = sae.W_enc.detach(), sae.W_dec.detach(), sae.b_enc.detach()
    x = make_batch(shape, device)
    options = {"kernels": kernels}
    yield (
        "encode_topk",
        clock.times(lambda: encode_topk(x, W_enc, b_enc, shape.k, compute=Compute(kernels, "bfloat16"))),
    )
    values, indices = encode_topk(x, W_enc, b_enc, shape.k, compute=Compute(kernels, "bfloat16"))
    yield "sort_pairs", clock.times(lambda: sort_pairs(indices, shape.d_latent))
    rows, rounded = x.bfloat16(), [W_dec.bfloat16()]
    yield "decode", clock.times(lambda: decode(values, indices, rounded[0], **options))
    yield "dot_picks", clock.times(lambda: dot_picks(rows, indices, rounded[0], **options))
    rounded.clear()
    order = PairOrder(indices, shape.d_latent)
    first, second = torch.zeros_like(W_dec), torch.zeros_like(W_dec)
    one = torch.ones((), device=device)
    for name, weight, unit_rows in (("W_enc", W_enc, False), ("W_dec", W_dec, True)):
        gradient = PairGradient()

        def norm(weight: torch.Tensor = weight, gradient: PairGradient = gradient) -> None:
            gradient.clear()
            gradient.add(values, indices, order, rows)
            gradient.squared_norm(weight, **options)

        def update(weight: torch.Tensor = weight, gradient: PairGradient = gradient, unit: bool = unit_rows) -> None:
            gradient.clear()
            gradient.add(values, indices, order, rows)
            adam = AdamStep(1e-4, (0.9, 0.999), 1e-8, step=1, clip=one, unit_rows=unit)
            gradient.update(weight, first, second, adam, **options)

        yield f"pair_norm {name}", clock.times(norm)
        yield f"pair_update {name}", clock.times(update)


def measured(make: Callable[[], Callable[[], None]], clock: Clock) -> tuple[list[float], float] | str:
    """Milliseconds of the steps and peak GB, or why there are none."""
    free(clock.cuda)
    try:
        times = clock.times(make())
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # a yardstick that this torch can't compile is no reason to lose the table
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return times, torch.cuda.max_memory_allocated() / 1e9 if clock.cuda else 0.0


def free(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bench(shape: Shape, device: str, kernels: str, peak: float, clock: Clock) -> tuple[dict[str, Any], list[Record]]:
    """One row of the table, and the records for results.csv."""
    row: dict[str, Any] = {"shape": str(shape)}
    row["floor_ms"] = 2 * shape.batch * shape.d_latent * shape.d_model / peak * 1e3
    contenders: dict[str, Callable[[], Callable[[], None]]] = {
        "granary": lambda: our_step(shape, device, kernels),
        "dense": lambda: dense_step(shape, device),
        "compiled": lambda: our_step(shape, device, "reference", compiled=True),
    }
    records = []
    for name, make in contenders.items():
        outcome = measured(make, clock)
        if isinstance(outcome, str):
            row[f"{name}_ms"] = outcome
            continue
        times, peak_gb = outcome
        row[f"{name}_ms"], row[f"{name}_gb"] = quantiles(times)[1], peak_gb
        records.append(Record("step", name, str(shape), "bfloat16", [t / 1e3 for t in times], peak_gb * 1e3))
    free(clock.cuda)
    row["state_gb"] = 2 * 3 * 4 * shape.d_latent * shape.d_model / 1e9
    ours = row["granary_ms"]
    if isinstance(ours, float):
        row |= {"times_floor": ours / row["floor_ms"], "tokens_per_s": shape.batch / ours * 1e3}
        row["extra_gb"] = row["granary_gb"] - row["state_gb"]
    row["parts"] = {}
    for name, times in parts(shape, device, kernels, clock):
        row["parts"][name] = quantiles(times)[1]
        records.append(Record(name, "granary", str(shape), "bfloat16", [t / 1e3 for t in times], None))
    return row, records


def table(rows: list[dict[str, Any]], machine: str, peak: float) -> str:
    """Markdown."""

    def cell(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:.2f}" if isinstance(value, float) else "-"

    lines = [
        "# The sparse step on a GPU",
        "",
        f"{machine}, torch {torch.__version__}, bf16 rate measured {peak / 1e12:.0f} TFLOP/s. `make bench-gpu`. "
        f"Goals: {GOALS}. Milliseconds, medians; extra GB is peak memory above weights and moments.",
        "",
        "| shape | floor | granary | x floor | dense | reference under torch.compile | extra GB | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("floor_ms", "granary_ms", "times_floor", "dense_ms", "compiled_ms", "extra_gb")
    for row in rows:
        speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "-"
        lines.append(f"| {row['shape']} | " + " | ".join(cell(row.get(key)) for key in keys) + f" | {speed} |")
    names = list(rows[0]["parts"])
    lines += [
        "",
        "## Its parts, each alone",
        "",
        "| shape | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [f"| {row['shape']} | " + " | ".join(cell(row["parts"][name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shapes", nargs="*", help="F,k,N at d_model 4096; default: all combinations of the goals")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--skip-tuning", action="store_true", help="use block sizes as they are")
    parser.add_argument("--dry-run", action="store_true", help="a tiny size, on a CPU too; writes to --out only")
    parser.add_argument("--quick", action="store_true", help="as --dry-run, for make bench")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    dry = options.dry_run or options.quick
    if not dry and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here; --dry-run runs every code path at a tiny size on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = "triton" if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "torch"
    clock = Clock(device, 1 if dry else options.repeats)
    shapes = DRY_SHAPES
    if not dry:
        sizes = itertools.product(LATENTS, KS, BATCHES)
        if options.shapes:
            sizes = [tuple(map(int, shape.split(","))) for shape in options.shapes]  # type: ignore[assignment]
        shapes = [Shape(D_MODEL, *size) for size in sizes]
    if not options.skip_tuning:
        from tune import tune

        tune(shapes[0], device, kernels, clock.median, keep=not dry)
    peak = peak_flops(device, 64 if dry else 8192, clock)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU (dry run: no figure means anything)"
    rows = []
    for shape in shapes:
        row, records = bench(shape, device, kernels, peak, clock)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if not dry:  # after each shape: what is measured stays measured
            append(records, machine, threads=0, versions={})
            options.out.write_text(table(rows, machine, peak))
    print(table(rows, machine, peak))
    print(json.dumps({"machine": machine, "peak_tflops": peak / 1e12, "rows": rows}))


if __name__ == "__main__":
    main()
