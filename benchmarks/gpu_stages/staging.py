"""Stage ``staging``: how long training stands still for a checkpoint, until its state is on the host."""

import time
from collections.abc import Callable

import torch

from gpu_stages.context import Context
from stage_train.state.staging import HostCopies

STATE_GB = 12.9
"""Weights and moments of 131,072 latents of width 4,096."""
TENSORS = 6


def run(context: Context) -> None:
    """Into new memory, as torch does it; then page-locked, where it has to be made and where it is there already."""
    size = 1 << 10 if context.rehearse else int(STATE_GB * 1e9 / 4 / TENSORS)
    state = {str(number): torch.full((size,), float(number), device=context.device) for number in range(TENSORS)}
    copies = HostCopies()
    ways: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "new memory": lambda: {name: tensor.to("cpu", copy=True) for name, tensor in state.items()},
        "page-locked, first": lambda: copies.copy(state),
        "page-locked, again": lambda: copies.copy(state),
    }
    for way, copy in ways.items():
        if not context.rehearse:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        copied = copy()
        seconds = time.perf_counter() - begin
        wrong = sum(bool((tensor != float(name)).any()) for name, tensor in copied.items())
        gb = 4 * size * TENSORS / 1e9
        context.check(f"staging, {way}", wrong, 0, seconds=seconds, gb=gb, gb_per_s=gb / seconds)
        del copied
