"""A plan as a table for people and as JSON for programs."""

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared.basics.units import GIB, human_bytes, human_time
from stage_train.plan.memory import Memory
from stage_train.plan.run import PlannedRun

if TYPE_CHECKING:
    from shared.lm.base_memory import BaseMemory

# Blocks below this share of the total are shown as one.
SMALL = 0.005


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
    most, is_free = spec.most_picks(cfg.fullest_row), spec.dictionary.activation == "batchtopk"
    dead = round(run.dead_fraction * spec.dictionary.d_latent)
    told = {
        f"assumed: {dead:,} dead latents (dead_fraction)": dead > 0,
        f"assumed: up to {most} picks of one token (fullest_row)": is_free,
        "planned with torch's operations, as Triton is not here: its kernels take less": not run.triton,
        "not counted: the CUDA context, NCCL's buffers and fragmentation; leave a tenth free": True,
    }
    lines += [line for line, holds in told.items() if holds and (run.cuda or "assumed" in line)]
    return "\n".join(lines)
