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
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shared.kernels.fake_cuda import FakeCuda
from shared.kernels.trace import MMAP_THRESHOLD, Most, Trace
from shared.parallel import World
from shared.sae.learn import init
from shared.sae.sites import Sites
from stage_train.data.inputs import SAMPLE_TOKENS
from stage_train.data.stream import Batch
from stage_train.data.stream.sample import SAMPLE_CONTEXTS
from stage_train.estimate.job import PlannedRun
from stage_train.run import make_objective, put_together
from stage_train.spec import RunSpec
from stage_train.step.layouts import make_layout

STATE = {"sae": "weights", "optim": "optimiser moments", "ema": "weight average"}


@dataclass(frozen=True)
class Phase:
    """A part of the run: the largest sums of bytes, of all blocks, of large and of small ones."""

    name: str
    total: int
    large: int
    small: int
    blocks: Mapping[str, int]
    """Of the first sum."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank, without what the interpreter and libraries take."""

    peak: Phase
    """The moment at which the device holds most."""
    kept: int
    """Of a CPU: what malloc keeps of other moments."""
    host: int
    """Beside a GPU: on the host; 0 without."""
    state: int
    """Of a checkpoint: the rank's part."""
    weights: int
    upper_bound: bool
    """For a GPU by torch's operations, where Triton, whose kernels take less, can't be used."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.peak.total + self.kept


def find_memory(job: PlannedRun, *, start: bool = True) -> Memory:
    """Follow the start and one step of a rank. Without the `start`, `host` and a CPU's total leave it out."""
    spec, interpreted = widest(job.spec), os.environ.get("TRITON_INTERPRET") == "1"  # then kernels want values
    triton = job.cuda and importlib.util.find_spec("triton") is not None and not interpreted
    begins = start and spec.cfg.init_from is None
    with one_of(job.ranks):
        layout = make_layout(spec.cfg.parallel, World(0, job.ranks, 0, torch.device("cpu")))
        lengths = {layout.num_latents(spec.dictionary.d_latent): job.dead}
        with one_try(), Trace(picks=job.picks, lengths=lengths, gloo=not job.cuda) as trace, ExitStack() as on_gpu:
            objective = make_objective(spec, Sample(job), torch.device("cpu"), begins=begins)  # type: ignore[arg-type]
            initialisation = trace.begin()
            if triton:
                on_gpu.enter_context(FakeCuda("cpu"))
            objective = layout.distribute(objective)
            trainer = put_together(spec, objective, None, layout)  # type: ignore[arg-type]
            del objective
            distribution = trace.begin()
            batch = empty_batch(job)
            trainer.step(batch)
            step = trace.begin()
            tensors = {name: _local(tensor) for name, tensor in trainer.tensors().items()}
            after = trace.begin()
            names = {trace.number(t): STATE.get(name.partition(".")[0], "counters") for name, t in tensors.items()}
            names |= {trace.number(rows): "batch" for rows in batch.activations.values()}
    masks = {"masks of the store": [job.data.mask_bytes]}
    pool = {"stream": job.pool_bytes}
    copy = {"copy of the state for a checkpoint": [tensor.nbytes for tensor in tensors.values()]}
    on_host, on_device = (masks, pool) if job.pool_on_device else (masks | pool, {})
    started = _phase("start", initialisation, names)
    put = _phase("distribution", distribution, names)
    saved = _phase("checkpoint", after, names, on_host | on_device | copy)
    if job.cuda:
        phases, kept = [started, put, _phase("step", step, names, on_device)], 0
        host = resident([started, _phase("checkpoint", Most(), names, on_host | copy)])
    else:
        held = on_host | on_device | (copy if 0 < spec.save_every < spec.length.steps else {})
        phases, host = [started, put, saved, _phase("step", step, names, held)], 0
        kept = resident(phases) - max(phase.total for phase in phases)
    return Memory(
        peak=max(phases, key=lambda phase: phase.total),
        kept=kept,
        host=host,
        state=sum(tensor.nbytes for tensor in tensors.values()),
        weights=sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("sae.")),
        upper_bound=job.cuda and not triton,
    )


def _phase(name: str, most: Most, names: Mapping[int, str], more: Mapping[str, Sequence[int]] = {}) -> Phase:
    """A part of the run with `more` blocks alive all the time. Tensors without a name go by type and shape."""
    alike = Counter(names.get(key, label) for key, (_, label) in most.alive.items())
    blocks: Counter[str] = Counter()
    for key, (size, label) in most.alive.items():
        what = names.get(key, f"{alike[label]} x {label}")
        blocks[what if size * 500 > most.total or key in names else "smaller tensors"] += size
    blocks.update({what: sum(sizes) for what, sizes in more.items()})
    sizes = [size for block in more.values() for size in block]
    large = sum(size for size in sizes if size >= MMAP_THRESHOLD)
    return Phase(name, most.total + sum(sizes), most.large + large, most.small + sum(sizes) - large, blocks)


def resident(phases: Sequence[Phase]) -> int:
    """Of a process that goes through all of them."""
    return max(phase.large for phase in phases) + max(phase.small for phase in phases)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def widest(spec: RunSpec) -> RunSpec:
    """With the most latents per token that its schedule comes to, and kernels that start on a CPU too."""
    k, compute = spec.schedules.k, spec.cfg.compute
    if k is not None:
        k = replace(k, start=max(k.start, k.end), end=max(k.start, k.end))
    if compute.kernels == "triton":
        compute = replace(compute, kernels="auto")
    return replace(spec, schedules=replace(spec.schedules, k=k), cfg=replace(spec.cfg, compute=compute))


class Sample:
    """As much as ``TrainingInputs`` gives to the start."""

    def __init__(self, job: PlannedRun) -> None:
        contexts = min(SAMPLE_CONTEXTS, job.data.contexts or SAMPLE_CONTEXTS)
        self.rows = min(SAMPLE_TOKENS, round(contexts * job.data.tokens_per_context))
        self.widths = job.data.widths
        self.kept: list[Tensor] = []

    def sample(self, sites: Sites, seed: int) -> tuple[Tensor, Tensor]:
        """x and y."""
        found = {site: torch.empty(self.rows, width) for site, width in self.widths.items()}
        self.kept += found.values()
        return sites.pick(found)

    def statistics(self, site: str) -> SimpleNamespace:
        """Any."""
        ones = torch.ones(self.widths[site])
        return SimpleNamespace(mean=ones, var=ones, mean_norm=1.0)


def empty_batch(job: PlannedRun) -> Batch:
    """The rank's rows."""
    rows = {site: torch.empty(job.rows, width) for site, width in job.data.widths.items()}
    return Batch(rows, epoch=0, index=0, num_tokens=job.spec.cfg.stream.batch_size, most_rows=job.rows)


@contextmanager
def one_try() -> Iterator[None]:
    """Where the start searches a scale, every try takes the same memory: make a single one."""

    def try_first(loss: Callable[[float], float], coarse: Sequence[float], steps: int) -> float:
        loss(coarse[0])
        return coarse[0]

    search, init.grid_search = init.grid_search, try_first
    try:
        yield
    finally:
        init.grid_search = search


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
