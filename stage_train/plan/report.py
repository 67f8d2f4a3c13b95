"""How fast a run goes and what it reads, and the plan as a table for people and as JSON for programs."""

import json
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from shared.basics.errors import GranaryError
from shared.basics.units import GIB, human_bytes, human_time
from stage_train.config import LayoutKind
from stage_train.plan.memory import Memory
from stage_train.plan.run import PlannedRun

if TYPE_CHECKING:
    from shared.lm.base_memory import BaseMemory

# Time of a step over that of its products alone: the worse of docs/measured.md's two, on a CPU.
STEP = 1.75
MEASURED_STEPS = 3
# Blocks below this share of the total are shown as one.
SMALL = 0.005


def find_pace(run: PlannedRun, flop: int) -> dict[str, Any]:
    """Speed, time and bytes read, all ranks together where nothing else is said; None where nothing says it.

    `flop` are the products of a rank's step. ``reads``: times that a token is read, by each rank of a latent group, or
    once per machine where the page cache of a local store gives it to the others.
    """
    cfg, tokens, batch = run.cfg, run.spec.length.tokens, run.cfg.stream.batch_size
    per_token = flop * run.ranks / batch
    speed, basis = cfg.tokens_per_s, "as given"
    if speed is None and cfg.measure:
        speed = batch / measured_seconds(run)
        basis = f"{MEASURED_STEPS} steps of one rank's part on this machine, no messages between ranks"
    elif speed is None and cfg.tflops is not None:
        speed = cfg.tflops * 1e12 * run.ranks / (per_token * STEP)
        basis = f"assumed: {cfg.tflops:g} TFLOP/s per rank, a step {STEP:g} x its products, no messages"
    elif speed is None:
        basis = "give tokens_per_s=..., tflops=... of a rank, or measure=true"
    remote = cfg.d_model is None and "://" in cfg.store.url
    reads = run.reads if remote else max(1.0, run.reads / cfg.nproc)
    of_a_machine = run.bytes_per_token * reads / cfg.nodes
    return {
        "gflop_per_token": per_token / 1e9,
        "tokens_per_s": speed,
        "basis": basis,
        "seconds": speed and tokens / speed,
        "read_bytes_per_token": run.bytes_per_token,
        "read_bytes": tokens * run.bytes_per_token * reads,
        "reads": reads,
        "read_mb_s": speed and speed * of_a_machine / 1e6,
        "disk_tokens_per_s": cfg.disk_mb_s and cfg.disk_mb_s * 1e6 / of_a_machine,
    }


def measured_seconds(run: PlannedRun) -> float:
    """Median time of a step of one rank on this machine, on random activations."""
    if run.cuda and not torch.cuda.is_available():
        raise GranaryError("measure=true with device.name=cuda, but torch sees no CUDA device: give tflops=... instead")
    parallel, seconds = run.cfg.parallel, []
    if parallel.layout is LayoutKind.fsdp:  # which computes the same, from rows that messages bring
        parallel = replace(parallel, layout=LayoutKind.ddp)
    with run.layout(parallel, torch.device("cuda" if run.cuda else "cpu")) as layout:
        trainer, batch = run.begin(layout)
        for parameter in trainer.objective.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for _ in range(MEASURED_STEPS + 1):
            begin = time.perf_counter()
            trainer.step(batch)
            float(trainer.grad_norm)  # waits for the device
            seconds.append(time.perf_counter() - begin)
    return sorted(seconds[1:])[MEASURED_STEPS // 2]


def as_json(run: PlannedRun, memory: Memory, pace: dict[str, Any], base: "BaseMemory | None") -> str:
    """One object, of bytes, tokens and seconds."""
    spec, length = run.spec, run.spec.length
    sae = {"d_model": spec.widths.d_in, **spec.dictionary.own_fields(), **spec.learning.to_dict()}
    whole = {"sae": sae, "layout": run.cfg.parallel.layout.value, "ranks": run.ranks, "steps": length.steps}
    frozen = {"base": asdict(base)} if base else {}
    return json.dumps({**whole, "tokens": length.tokens, **frozen, "memory": asdict(memory), "pace": pace})


def table(run: PlannedRun, memory: Memory, pace: dict[str, Any], base: "BaseMemory | None") -> str:
    """Lines of text."""
    spec, cfg, speed, fed = run.spec, run.cfg, pace["tokens_per_s"], pace["disk_tokens_per_s"]
    blocks = Counter[str]()
    for name, size in memory.blocks.items():
        blocks[name if size >= SMALL * memory.total else "smaller ones"] += size
    sizes = [*blocks.most_common(), ("total", memory.total)]
    sizes += [("host memory per rank, beside interpreter and libraries", memory.host)] if run.cuda else []
    sizes += [("disk: checkpoints and the exported dictionary, at most", memory.disk)]
    lines = [
        f"dictionary: {spec.describe()}, {spec.sites}, widths {spec.widths.d_in:,} and {spec.widths.d_out:,}",
        f"run: {spec.length.steps:,} steps of {cfg.stream.batch_size:,} tokens, {spec.length.tokens:,} in all",
        f"ranks: {run.ranks} on {'GPU' if run.cuda else 'CPU'}, layout {cfg.parallel.layout.value}; each computes "
        f"{run.num_latents:,} latents for {run.rows:,} rows of a batch",
        *([f"base: {base}"] if base else []),
        f"memory per rank, GiB, at its peak ({memory.peak})",
        *(f"  {name:<56}{size / GIB:>10.3f}" for name, size in sizes),
        f"products: {pace['gflop_per_token']:.3g} GFLOP per token",
        f"time: unknown; {pace['basis']}",
        f"reading: {pace['read_bytes_per_token']:,.0f} bytes per token, {human_bytes(pace['read_bytes'])} in all",
    ]
    if speed is not None:
        lines[-2] = f"time: {human_time(pace['seconds'])} at {speed:,.0f} tokens/s ({pace['basis']})"
        lines[-1] += f", {human_bytes(1e6 * pace['read_mb_s'])}/s on each machine"
    if fed is not None:
        lines.append(f"the disk's {cfg.disk_mb_s:g} MB/s feed {fed:,.0f} tokens/s")
        if speed is not None and fed < speed:
            longer = human_time(pace["seconds"] * speed / fed)
            lines[-1] += f": training would wait {1 - fed / speed:.0%} of the time and take {longer}"
    dead = round(run.dead_fraction * spec.dictionary.d_latent)
    told = {
        f"assumed: {dead:,} dead latents (dead_fraction)": dead > 0,
        f"assumed: up to {run.picks} picks of one token (fullest_row)": spec.dictionary.activation == "batchtopk",
        "planned with torch's operations, as Triton is not here: its kernels take less": not run.triton,
        "not counted: the CUDA context, NCCL's buffers and fragmentation; leave a tenth free": True,
    }
    lines += [line for line, holds in told.items() if holds and (run.cuda or "assumed" in line)]
    return "\n".join(lines)
