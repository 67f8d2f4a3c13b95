"""How fast a run goes, how long it takes, and what it reads meanwhile."""

import time
from dataclasses import dataclass, replace

import torch

from shared.basics.errors import GranaryError
from shared.parallel import World
from stage_train.config import LayoutKind
from stage_train.estimate.config import PlanSchema
from stage_train.estimate.job import PlannedRun
from stage_train.estimate.memory import one_of
from stage_train.run import make_objective, put_together
from stage_train.step.layouts import make_layout

# Time of a step over that of its products alone: the worse of README.md's two, on a CPU.
STEP = 1.75
MEASURED_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed and time of a run; None where nothing says it."""

    gflop_per_token: float
    """Of the matrix products."""
    tokens_per_s: float | None
    """All ranks together."""
    basis: str
    """Where it comes from."""
    seconds: float | None
    """Of the whole run."""
    read_bytes_per_token: float
    """Once."""
    reads: float
    """Times that a token is read, all machines together: by each rank of a latent group; once per machine where the
    page cache of a local store gives it to the others."""
    read_mb_s: float | None
    """That each machine must read, MB (10^6) per second."""
    disk_tokens_per_s: float | None
    """What ``disk_mb_s`` of every machine feed."""


def find_pace(options: PlanSchema, job: PlannedRun, flop: int) -> Pace:
    """From what the options say or measure, and the products of a rank's step."""
    cfg = job.spec.cfg
    per_token = flop * job.ranks / cfg.stream.batch_size
    speed, basis = options.tokens_per_s, "as given"
    if speed is None and options.measure:
        speed = cfg.stream.batch_size / measured_seconds(job)
        basis = f"{MEASURED_STEPS} steps of one rank's part on this machine, no messages between ranks"
    elif speed is None and options.tflops is not None:
        speed = options.tflops * 1e12 * job.ranks / (per_token * STEP)
        basis = f"assumed: {options.tflops:g} TFLOP/s per rank, a step {STEP:g} x its products, no messages"
    elif speed is None:
        basis = "give tokens_per_s=..., tflops=... of a rank, or measure=true"
    remote = options.d_model is None and "://" in cfg.store.url
    reads = job.parts if remote else max(1.0, job.parts / cfg.nproc)
    of_a_machine = job.data.bytes_per_token * reads / options.nodes
    return Pace(
        gflop_per_token=per_token / 1e9,
        tokens_per_s=speed,
        basis=basis,
        seconds=None if speed is None else job.spec.length.tokens / speed,
        read_bytes_per_token=job.data.bytes_per_token,
        reads=reads,
        read_mb_s=None if speed is None else speed * of_a_machine / 1e6,
        disk_tokens_per_s=None if options.disk_mb_s is None else options.disk_mb_s * 1e6 / of_a_machine,
    )


def measured_seconds(job: PlannedRun) -> float:
    """Median time of a step of one rank on this machine, on random activations."""
    if job.cuda and not torch.cuda.is_available():
        raise GranaryError("measure=true with device.name=cuda, but torch sees no CUDA device: give tflops=... instead")
    device, parallel = torch.device("cuda" if job.cuda else "cpu"), job.spec.cfg.parallel
    if parallel.layout is LayoutKind.fsdp:  # which computes the same, from rows that messages bring
        parallel = replace(parallel, layout=LayoutKind.ddp)
    seconds = []
    with one_of(job.ranks):
        layout = make_layout(parallel, World(0, job.ranks, 0, device))
        whole = make_objective(job.spec, job.own, torch.device("meta"), layout, begins=False)  # type: ignore[arg-type]
        objective, batch = layout.distribute(whole, has_values=False), job.batch(device)
        for parameter in objective.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        trainer = put_together(job.spec, objective, None, layout)  # type: ignore[arg-type]
        for _ in range(MEASURED_STEPS + 1):
            begin = time.perf_counter()
            trainer.step(batch)
            float(trainer.grad_norm)  # waits for the device
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[MEASURED_STEPS // 2]
