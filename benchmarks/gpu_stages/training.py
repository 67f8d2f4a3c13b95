"""Stage ``train``: 20 steps of each kind by the kernels and by the dense reference, and waits for the device."""

import warnings

import torch
from step_providers import Shape, make_batch

from gpu_stages.context import Context
from gpu_stages.trainee import KINDS, make_trainee

STEPS = 20
SYNCS = {"topk": 0, "transcoder": 0, "batchtopk": 5}
"""Waits for the device that a step may have. BatchTopK must know sizes on the host: how many pairs passed the lower
bound and the fullest row's (to lay them out), whether they suffice, the next bound, and the width of what is kept."""


def run(context: Context) -> None:
    """Loss curves, and the host synchronisations of one step."""
    shape = Shape(24, 128, 4, 8) if context.rehearse else Shape(512, 4096, 32, 2048)
    steps = 2 if context.rehearse else STEPS
    batches = make_batch(Shape(shape.d_model, shape.d_latent, shape.k, steps * shape.batch), context.device)
    for kind in KINDS:
        curves = []
        for kernels, compute_dtype in ((context.kernels, "bfloat16"), ("reference", "float32")):
            trainee = make_trainee(
                shape, context.device, kind=kind, kernels=kernels, compute_dtype=compute_dtype, lr=1e-3
            )
            curves.append(torch.stack([trainee.step(x) for x in batches.split(shape.batch)]).double())
        worst = float(((curves[0] - curves[1]) / curves[1]).abs().max())
        context.check(f"loss curve, {kind}", worst, 2e-2, first=float(curves[1][0]), last=float(curves[1][-1]))
        if not context.rehearse:
            context.check(f"host synchronisations, {kind}", count_syncs(shape, batches, kind), SYNCS[kind])


def count_syncs(shape: Shape, batches: torch.Tensor, kind: str) -> int:
    """Of the third step."""
    trainee = make_trainee(shape, "cuda", kind=kind)
    parts = batches.split(shape.batch)
    for x in parts[:2]:
        trainee.step(x)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainee.step(parts[2])
        torch.cuda.set_sync_debug_mode("default")
    for warning in seen:
        print(warning.filename, warning.lineno, str(warning.message)[:200], flush=True)
    return sum("called a synchronizing" in str(warning.message) for warning in seen)
