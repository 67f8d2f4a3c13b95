"""The plan as a table for people and as JSON for programs."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from shared.basics.units import GIB, human_time
from stage_train.estimate.config import PlanSchema
from stage_train.estimate.job import PlannedRun
from stage_train.estimate.memory import Memory
from stage_train.estimate.pace import Pace

# Blocks below this share of the total are shown as one.
SMALL = 0.002


def as_json(job: PlannedRun, memory: Memory, pace: Pace) -> dict[str, Any]:
    """Bytes, tokens and seconds."""
    spec = job.spec
    return {
        "sae": {"d_model": spec.widths.d_in, **spec.dictionary.own_fields(), **spec.learning.to_dict()},
        "layout": spec.cfg.parallel.layout.value,
        "ranks": job.ranks,
        "steps": spec.length.steps,
        "tokens": spec.length.tokens,
        "memory": asdict(memory),
        "pace": asdict(pace),
    }


def table(job: PlannedRun, memory: Memory, pace: Pace, options: PlanSchema) -> str:
    """Lines of text."""
    spec, layout = job.spec, job.spec.cfg.parallel.layout.value
    blocks = Counter[str]()
    for name, size in memory.blocks.items():
        blocks[name if size >= SMALL * memory.total else "smaller ones"] += size
    lines = [
        f"dictionary: {spec.describe()}, {spec.sites}, widths {spec.widths.d_in:,} and {spec.widths.d_out:,}",
        f"run: {spec.length.steps:,} steps of {spec.cfg.stream.batch_size:,} tokens, {spec.length.tokens:,} in all",
        f"ranks: {job.ranks} on {'GPU' if job.cuda else 'CPU'}, layout {layout}; each computes "
        f"{job.latents:,} latents for {job.rows:,} rows of a batch",
        "",
        f"memory per rank, GiB, at its peak ({memory.peak})",
        *(_line(name, size) for name, size in [*blocks.most_common(), ("total", memory.total)]),
        "",
        *([_line("host memory per rank, beside interpreter and libraries", memory.host)] if job.cuda else []),
        _line("disk: checkpoints and the exported dictionary, at most", memory.disk),
        "",
        *speed_lines(pace, options),
    ]
    if job.dead_fraction:
        lines.append(f"assumed: {round(job.dead_fraction * spec.dictionary.d_latent):,} dead latents (dead_fraction)")
    if spec.dictionary.activation == "batchtopk":
        lines.append(f"assumed: up to {job.picks} picks of one token (fullest_row)")
    if memory.upper_bound:
        lines.append("planned with torch's operations, as Triton is not here: its kernels take less")
    if job.cuda:
        lines.append("not counted: the CUDA context, NCCL's buffers and fragmentation; leave a tenth free")
    if options.memory_gib is not None and memory.total <= options.memory_gib * GIB:
        lines.append(f"fits: {memory.total / GIB:.2f} of {options.memory_gib:g} GiB per rank")
    return "\n".join(lines)


def speed_lines(pace: Pace, options: PlanSchema) -> list[str]:
    """Products, time and reading."""
    speed, often = pace.tokens_per_s, f", {pace.reads:g} times" if pace.reads > 1 else ""
    lines = [
        f"products: {pace.gflop_per_token:.3g} GFLOP per token",
        f"time: unknown; {pace.basis}",
        f"reading: {pace.read_bytes_per_token:,.0f} bytes per token{often}",
    ]
    if speed is not None and pace.seconds is not None:
        lines[1] = f"time: {human_time(pace.seconds)} at {speed:,.0f} tokens/s ({pace.basis})"
        lines[2] += f", {pace.read_mb_s:,.1f} MB/s on each machine"
    if (fed := pace.disk_tokens_per_s) is not None:
        lines.append(f"the disk's {options.disk_mb_s:g} MB/s feed {fed:,.0f} tokens/s")
        if speed is not None and pace.seconds is not None and fed < speed:
            longer = human_time(pace.seconds * speed / fed)
            lines[-1] += f": training would wait {1 - fed / speed:.0%} of the time and take {longer}"
    return lines


def _line(name: str, size: int) -> str:
    return f"  {name:<56}{size / GIB:>10.3f}"
