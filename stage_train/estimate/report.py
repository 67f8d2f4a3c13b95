"""The plan as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shared.basics.units import GIB
from stage_train.estimate.job import PlannedRun
from stage_train.estimate.pace import Pace
from stage_train.estimate.phases import Block, device_phases, host_phases, peak, staged


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will need. Bytes, per rank where nothing else is said."""

    job: PlannedRun
    pace: Pace
    phase: str
    """The moment at which the device holds most."""
    blocks: list[Block]
    """What it holds then."""
    kept: int
    """Of a CPU: what malloc keeps of other moments."""
    fixed: int
    """Of a CPU: interpreter, torch and libraries, measured in this process."""
    host: int
    """Beside a GPU: memory of its process on the host, without interpreter and libraries."""
    checkpoint_bytes: int
    """On disk, at most: `keep` checkpoints, the one being written, and the exported SAE."""

    @property
    def predicted(self) -> int:
        """Without what is fixed."""
        return sum(block.total for block in self.blocks) + self.kept

    @property
    def total(self) -> int:
        return self.predicted + self.fixed


def make_plan(job: PlannedRun, pace: Pace, fixed: int) -> Plan:
    """Put the parts together."""
    most, phase = peak(device_phases(job), heap=not job.cuda)
    state = staged(job).bytes * (job.latents and job.all_latents // job.latents)
    parameters = job.weight_bytes * (job.all_latents // job.latents)
    return Plan(
        job=job,
        pace=pace,
        phase=phase.name,
        blocks=[block for block in phase.blocks if block.total],
        kept=most - phase.total,
        fixed=0 if job.cuda else fixed,
        host=peak(host_phases(job), heap=True)[0] if job.cuda else 0,
        checkpoint_bytes=state * (job.keep + 1) + parameters,
    )


def table(plan: Plan, memory_gib: float | None, disk_mb_s: float | None) -> str:
    """Lines of text."""
    job, config, learning = plan.job, plan.job.config, plan.job.learning
    what = f"k {config.k}" if config.k else f"penalty {learning.penalty} {learning.penalty_weight:g}"
    lines = [
        f"SAE: {config.activation}, {what}, {config.d_latent:,} latents of width {job.d_model:,}",
        f"run: {job.steps:,} steps of {job.batch_tokens:,} tokens, {job.tokens:,} in all",
        f"layout: {job.layout}, {job.ranks} rank{'s' * (job.ranks > 1)} on {'GPU' if job.cuda else 'CPU'}; each holds "
        f"{job.latents:,} latents and reads {job.rows:,} rows of a batch, {job.micro_rows:,} at a time",
        "",
        f"memory per rank, GiB, at its peak ({plan.phase})",
    ]
    entries = [(block.what, block.total) for block in plan.blocks]
    if plan.kept > 0:
        entries.append(("kept by malloc from other moments", plan.kept))
    if plan.fixed:
        entries.append(("interpreter, torch, libraries (measured)", plan.fixed))
    lines += [_line(name, size) for name, size in _merged(entries)]
    lines.append(_line("total", plan.total))
    if job.cuda:
        lines += ["", _line("host memory per rank, beside interpreter and libraries", plan.host)]
    lines += [_line("disk: checkpoints and the exported SAE, at most", plan.checkpoint_bytes), ""]
    lines += speed_lines(plan, disk_mb_s)
    if job.dead:
        lines.append(f"assumed: {job.dead:,} dead latents held by a rank (dead_fraction)")
    if job.activation == "batchtopk":
        lines.append(f"assumed: up to {job.width} picks of one token (fullest_row)")
    if job.cuda:
        lines.append("not counted: the CUDA context, NCCL's buffers and fragmentation; leave a tenth free")
    if memory_gib is not None and plan.total <= memory_gib * GIB:
        lines.append(f"fits: {plan.total / GIB:.2f} of {memory_gib:g} GiB per rank")
    return "\n".join(lines)


def speed_lines(plan: Plan, disk_mb_s: float | None) -> list[str]:
    """Tokens per second, time and reading."""
    job, pace = plan.job, plan.pace
    read = f"reading: {pace.read_bytes_per_token:,.0f} bytes per token"
    if pace.reads > 1:
        read += f", {pace.reads:g} times"
    lines = [f"products: {pace.flop_per_token / 1e9:.3g} GFLOP per token"]
    speed, seconds, mb_s = pace.tokens_per_s, pace.seconds(job.tokens), pace.read_mb_s
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
                f"{1 - feeds / speed:.0%} of the time and take {duration(job.tokens / feeds)}"
            )
        else:
            lines.append(f"the disk's {disk_mb_s:g} MB/s are enough")
    return lines


def as_json(plan: Plan) -> dict[str, Any]:
    """Bytes, tokens and seconds."""
    job, pace = plan.job, plan.pace
    return {
        "sae": {"d_model": job.d_model, **job.config.own_fields(), **job.learning.to_dict()},
        "layout": job.layout,
        "ranks": job.ranks,
        "steps": job.steps,
        "tokens": job.tokens,
        "memory": {
            "peak": plan.phase,
            "blocks": dict(_merged([(block.what, block.total) for block in plan.blocks])),
            "kept_by_malloc": plan.kept,
            "fixed": plan.fixed,
            "total": plan.total,
            "host": plan.host,
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "pace": {**asdict(pace), "seconds": pace.seconds(job.tokens), "read_mb_s": pace.read_mb_s},
    }


def duration(seconds: float) -> str:
    """``3.2 h``."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


def _merged(entries: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Entries of one name as one."""
    sums: dict[str, int] = {}
    for name, size in entries:
        sums[name] = sums.get(name, 0) + size
    return list(sums.items())


def _line(name: str, size: int) -> str:
    return f"  {name:<56}{size / GIB:>10.3f}"
