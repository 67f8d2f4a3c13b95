"""What a rank's memory holds, by running its code on tensors without memory: the start, and one step.

glibc takes blocks below 32 MiB from a heap that keeps its high-water mark, and maps larger ones, which go back when
they are freed. So the peak of a process is the largest sum of large blocks plus the largest sum of small ones, which
need not meet. On a GPU, whose allocator is told the sizes, it is the largest sum.
"""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist

from shared.kernels.fake_cuda import FakeCuda
from shared.kernels.trace import Trace
from shared.parallel import World
from shared.sae.learn import init
from stage_train.estimate.job import PlannedRun
from stage_train.run import make_objective, put_together
from stage_train.state.staging import local
from stage_train.step.layouts import make_layout

CPU = torch.device("cpu")
STATE = {"sae": "weights", "optim": "optimiser moments", "ema": "weight average"}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank."""

    total: int
    """On its device, at the peak."""
    peak: str
    """When that is: at the start, in a step, at a checkpoint."""
    blocks: Mapping[str, int]
    """What the total is made of."""
    host: int
    """Beside a GPU: on the host; 0 without."""
    disk: int
    """For all ranks together, at most: ``keep`` checkpoints, the one being written, and the exported dictionary."""
    upper_bound: bool
    """For a GPU by torch's operations, where Triton, whose kernels take less, can't be used."""
    flop: int
    """Not memory: of the matrix products in the rank's step."""


def find_memory(job: PlannedRun, libraries: int = 0) -> Memory:
    """Follow the start and one step of a rank. `libraries`: what a process on a CPU has taken before."""
    spec, interpreted = job.spec, os.environ.get("TRITON_INTERPRET") == "1"  # then kernels want values
    triton = job.cuda and importlib.util.find_spec("triton") is not None and not interpreted
    masks = job.data.tokens.mask_bits.nbytes + job.data.tokens.counts.nbytes
    with one_of(job.ranks), ExitStack() as stack:
        layout = make_layout(spec.cfg.parallel, World(0, job.ranks, 0, CPU))
        latents = layout.num_latents(spec.dictionary)
        of_group = spec.dictionary.d_latent // spec.dictionary.num_groups
        dead = {count: round(job.dead_fraction * count) for count in (latents, of_group)}
        trace = stack.enter_context(Trace(picks=job.picks, lengths=dead, gloo=not job.cuda))
        stack.enter_context(patch.object(init, "grid_search", first_try))
        if triton:
            stack.enter_context(FakeCuda("cpu"))
        trace.moment = "start"
        held = {"masks of the store": [torch.empty(masks * (not job.cuda), dtype=torch.uint8)]}
        begins = spec.cfg.init_from is None
        objective = make_objective(spec, job.own, CPU, layout, begins=begins)  # type: ignore[arg-type]
        trainer = put_together(spec, layout.distribute(objective), None, layout)  # type: ignore[arg-type]
        del objective
        held["stream"] = [torch.empty(job.pool_bytes * job.pool_on_device, dtype=torch.uint8)]
        batch, whole = job.batch(CPU), trainer.tensors()
        held["batch"] = list(batch.activations.values())
        own = {name: local(tensor) for name, tensor in whole.items()}
        for name, tensor in own.items():
            held.setdefault(STATE.get(name.partition(".")[0], "counters"), []).append(tensor)
        meanwhile = 0 < spec.save_every < spec.length.steps
        for moment in ("checkpoint", "step") if meanwhile else ("step", "checkpoint"):
            trace.moment = moment
            if moment == "step":
                trace.flop = 0
                trainer.step(batch)
            elif not job.cuda:  # whose copy is on the host
                held["copy of the state for a checkpoint"] = [torch.empty_like(tensor) for tensor in own.values()]
        for name, tensors in held.items():
            trace.storages.name(tensors, name)
    blocks, peak, weights = Counter[str](), trace.peak, 4 * spec.num_parameters
    for block, size in peak.blocks:
        blocks[block.name] += size
    if not job.cuda:
        blocks["kept by malloc from other moments"] = peak.large + peak.small - peak.total
        blocks["interpreter, torch, libraries (measured)"] = libraries
    copy, state = (sum(t.numel() * t.element_size() for t in tensors.values()) for tensors in (own, whole))
    on_host = masks + copy + job.pool_bytes * (not job.pool_on_device)
    return Memory(
        total=blocks.total(),
        peak=peak.moment,
        blocks=dict(blocks),
        host=on_host if job.cuda else 0,
        disk=state * (spec.cfg.checkpoint.keep + 1) + weights,
        upper_bound=job.cuda and not triton,
        flop=trace.flop,
    )


def first_try(loss: Callable[[float], float], coarse: Sequence[float], steps: int) -> float:
    """In place of a search for a scale, whose tries all take the same memory."""
    loss(coarse[0])
    return coarse[0]


@contextmanager
def one_of(ranks: int) -> Iterator[None]:
    """As the first of so many processes, whose messages go nowhere."""
    if ranks == 1:
        yield
        return
    from torch.distributed._tools import fake_collectives  # noqa: F401 (messages of tensors without memory)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
