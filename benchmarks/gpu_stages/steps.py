"""Stages ``step a`` and so on: the whole step at full size, its parts, its memory, and a profile of one step."""

import gc
from typing import Any

import torch
from step_providers import Shape, make_batch

from gpu_stages.context import Context
from gpu_stages.trainee import make_trainee
from shared.kernels import AdamStep, Compute, PairGradient, PairOrder, decode, dot_picks, encode_topk, sort_pairs


def run(context: Context, name: str) -> None:
    """Times, cheapest knowledge first: the step, then its parts."""
    shape = context.shape(name)
    x = make_batch(shape, context.device)
    for moments in ("float32", "bfloat16"):
        options = {"pair_gradients": not context.fallback, "moments": moments}
        measure(context, shape, x, f"moments {moments}", **options)
        gc.collect()  # what is left of a trainee, before the next one is made
    if not context.fallback:
        parts(context, shape, x)
    if not context.rehearse:
        profile(context, shape, x)  # last: launches stay slower once a profiler was there


def measure(context: Context, shape: Shape, x: torch.Tensor, name: str, **options: Any) -> None:
    """Time and peak memory of one step of a ``make_trainee`` with these `options`."""
    trainee = make_trainee(shape, context.device, kernels=context.kernels, **options)
    if not context.rehearse:
        torch.cuda.reset_peak_memory_stats()
    times = context.steady(lambda: trainee.step(x))
    peak = 0 if context.rehearse else torch.cuda.max_memory_allocated()
    context.say(
        f"step, {name}", shape=str(shape), ms=times, tokens_per_s=shape.batch / times * 1e3,
        state_gb=trainee.state_bytes / 1e9, above_state_gb=(peak - trainee.state_bytes) / 1e9,
    )  # fmt: skip


def profile(context: Context, shape: Shape, x: torch.Tensor) -> None:
    """Where one step's time goes, by kernel."""
    trainee = make_trainee(shape, context.device, kernels=context.kernels, pair_gradients=not context.fallback)
    trainee.step(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        trainee.step(x)
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=60)
    (context.out / f"profile-{context.stage.replace(' ', '-')}.txt").write_text(table)


def parts(context: Context, shape: Shape, x: torch.Tensor) -> None:
    """Each operation alone."""
    generator = torch.Generator(device=context.device).manual_seed(0)
    W = torch.randn(shape.d_latent, shape.d_model, device=context.device, generator=generator)
    W.div_(W.norm(dim=1, keepdim=True))
    b = torch.zeros(shape.d_latent, device=context.device)
    compute, options = Compute(context.kernels, "bfloat16"), {"kernels": context.kernels}

    def say(name: str, ms: float) -> None:
        context.say(f"part {name}", shape=str(shape), ms=ms)

    say("encode_topk", context.milliseconds(lambda: encode_topk(x, W, b, shape.k, compute=compute)))
    values, indices = encode_topk(x, W, b, shape.k, compute=compute)
    say("sort_pairs", context.milliseconds(lambda: sort_pairs(indices, shape.d_latent)))
    rows, rounded = x.bfloat16(), [W.bfloat16()]
    say("decode", context.milliseconds(lambda: decode(values, indices, rounded[0], **options)))
    say("dot_picks", context.milliseconds(lambda: dot_picks(rows, indices, rounded[0], **options)))
    rounded.clear()
    order = PairOrder(indices, shape.d_latent)
    first, second, one = torch.zeros_like(W), torch.zeros_like(W), torch.ones((), device=context.device)
    gradient = PairGradient()

    def fill() -> None:
        gradient.clear()
        gradient.add(values, indices, order, rows)

    def norm() -> None:
        fill()
        gradient.squared_norm(W, **options)

    say("pair_norm", context.milliseconds(norm))
    for unit_rows in (False, True):
        adam = AdamStep(1e-4, (0.9, 0.999), 1e-8, step=1, clip=one, unit_rows=unit_rows)

        def update(adam: AdamStep = adam) -> None:
            fill()
            gradient.update(W, first, second, adam, **options)

        say(f"pair_update unit_rows={unit_rows}", context.milliseconds(update))
