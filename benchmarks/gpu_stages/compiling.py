"""Stage ``compile``: every shipped configuration through this machine's compiler; registers and spills into a table."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch

from gpu_stages.context import Context
from shared.kernels import compile_check


def compile_one(label: str, architecture: int) -> str:
    """A row of the table, or why there is none."""
    for case in compile_check.cases((4096,), (64, 128), ("bf16", "fp32"), architecture):
        if case.label == label:
            try:
                return compile_check.row(compile_check.compile_case(case, architecture), architecture)
            except Exception as error:
                return f"FAILED: {type(error).__name__}: {error}"
    raise KeyError(label)


def run(context: Context) -> None:
    """In many processes: one variant takes half a second."""
    architecture = 90 if context.rehearse else 10 * torch.cuda.get_device_capability()[0]
    labels = [case.label for case in compile_check.cases((4096,), (64, 128), ("bf16", "fp32"))]
    if context.rehearse:
        labels = labels[:1] + labels[-1:]
    workers = 2 if context.rehearse else min(16, os.cpu_count() or 1)
    # Not forked: this process may have the GPU open.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(compile_one, labels, [architecture] * len(labels)))
    lines = [f"| {label} | {row} |" for label, row in zip(labels, rows, strict=True)]
    (context.out / "registers.md").write_text(compile_check.HEAD + "\n".join(lines) + "\n")
    failed = [label for label, row in zip(labels, rows, strict=True) if row.startswith("FAILED")]
    context.say("variants", ok=not failed, compiled=len(labels) - len(failed), failed=failed)
