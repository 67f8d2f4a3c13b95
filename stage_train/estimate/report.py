"""The plan as a table for people and as JSON for programs."""

from dataclasses import asdict, dataclass
from typing import Any

from shared.basics.units import GIB
from stage_train.estimate.job import PlannedRun
from stage_train.estimate.memory import Memory
from stage_train.estimate.pace import Pace


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need."""

    job: PlannedRun
    memory: Memory
    pace: Pace
    fixed: int
    """Bytes of interpreter, torch and libraries, measured in this process; 0 beside a GPU."""

    @property
    def total(self) -> int:
        """Bytes of a rank."""
        return self.memory.total + self.fixed

    @property
    def checkpoint_bytes(self) -> int:
        """On disk, at most: `keep` checkpoints, the one being written, and the exported dictionary."""
        parts = self.job.spec.dictionary.d_latent // self.job.latents
        return parts * (self.memory.state * (self.job.spec.cfg.checkpoint.keep + 1) + self.memory.weights)


def table(plan: Plan, memory_gib: float | None, disk_mb_s: float | None) -> str:
    """Lines of text."""
    job, memory, spec, peak = plan.job, plan.memory, plan.job.spec, plan.memory.peak
    lines = [
        f"dictionary: {spec.describe()}, {spec.sites}, widths {spec.widths.d_in:,} and {spec.widths.d_out:,}",
        f"run: {spec.length.steps:,} steps of {spec.cfg.stream.batch_size:,} tokens, {spec.length.tokens:,} in all",
        f"layout: {job.layout}, {job.ranks} rank{'s' * (job.ranks > 1)} on {'GPU' if job.cuda else 'CPU'}; each holds "
        f"{job.latents:,} latents and reads {job.rows:,} rows of a batch, {job.micro_rows:,} at a time",
        "",
        f"memory per rank, GiB, at its peak ({peak.name})",
        *(_line(name, size) for name, size in sorted(peak.blocks.items(), key=lambda item: -item[1])),
    ]
    if memory.kept > 0:
        lines.append(_line("kept by malloc from other moments", memory.kept))
    if plan.fixed:
        lines.append(_line("interpreter, torch, libraries (measured)", plan.fixed))
    lines.append(_line("total", plan.total))
    if job.cuda:
        lines += ["", _line("host memory per rank, beside interpreter and libraries", memory.host)]
    lines += [_line("disk: checkpoints and the exported dictionary, at most", plan.checkpoint_bytes), ""]
    lines += speed_lines(plan, disk_mb_s)
    if job.dead:
        lines.append(f"assumed: {job.dead:,} dead latents held by a rank (dead_fraction)")
    if spec.dictionary.activation == "batchtopk":
        lines.append(f"assumed: up to {job.picks} picks of one token (fullest_row)")
    if memory.upper_bound:
        lines.append("planned with torch's operations, as Triton is not here: its kernels take less")
    if job.cuda:
        lines.append("not counted: the CUDA context, NCCL's buffers and fragmentation; leave a tenth free")
    if memory_gib is not None and plan.total <= memory_gib * GIB:
        lines.append(f"fits: {plan.total / GIB:.2f} of {memory_gib:g} GiB per rank")
    return "\n".join(lines)


def speed_lines(plan: Plan, disk_mb_s: float | None) -> list[str]:
    """Tokens per second, time and reading."""
    pace, tokens = plan.pace, plan.job.spec.length.tokens
    read = f"reading: {pace.read_bytes_per_token:,.0f} bytes per token"
    if pace.reads > 1:
        read += f", {pace.reads:g} times"
    lines = [f"products: {pace.flop_per_token / 1e9:.3g} GFLOP per token"]
    speed, seconds, mb_s = pace.tokens_per_s, pace.seconds(tokens), pace.read_mb_s
    if speed is None or seconds is None or mb_s is None:
        lines += [read, f"time: unknown; {pace.basis}"]
    else:
        lines += [
            f"time: {duration(seconds)} at {speed:,.0f} tokens/s ({pace.basis})",
            f"{read}, {mb_s:,.1f} MB/s on each machine",
        ]
    if disk_mb_s is not None:
        feeds = pace.tokens_per_s_of_disk(disk_mb_s)
        if speed is None:
            lines.append(f"the disk's {disk_mb_s:g} MB/s feed {feeds:,.0f} tokens/s")
        elif feeds < speed:
            lines.append(
                f"the disk's {disk_mb_s:g} MB/s feed {feeds:,.0f} tokens/s: training would wait "
                f"{1 - feeds / speed:.0%} of the time and take {duration(tokens / feeds)}"
            )
        else:
            lines.append(f"the disk's {disk_mb_s:g} MB/s are enough")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, tokens and seconds."""
    job, memory, spec, pace = plan.job, plan.memory, plan.job.spec, plan.pace
    return {
        "sae": {"d_model": spec.widths.d_in, **spec.dictionary.own_fields(), **spec.learning.to_dict()},
        "layout": job.layout,
        "ranks": job.ranks,
        "steps": spec.length.steps,
        "tokens": spec.length.tokens,
        "memory": {
            "peak": memory.peak.name,
            "blocks": dict(memory.peak.blocks),
            "kept_by_malloc": memory.kept,
            "fixed": plan.fixed,
            "total": plan.total,
            "host": memory.host,
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "pace": {**asdict(pace), "seconds": pace.seconds(spec.length.tokens), "read_mb_s": pace.read_mb_s},
    }


def duration(seconds: float) -> str:
    """``3.2 h``."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def _line(name: str, size: int) -> str:
    return f"  {name:<56}{size / GIB:>10.3f}"
