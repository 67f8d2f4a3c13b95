"""How fast a run goes, and what it reads."""

from dataclasses import replace
from typing import Any

import torch

from shared.basics.errors import GranaryError
from stage_train.config import LayoutKind
from stage_train.plan.run import PlannedRun
from stage_train.step.timing import seconds_per_step

# Time of a step over that of its products alone: the worse of docs/measured.md's two, on a CPU.
STEP = 1.75
MEASURED_STEPS = 3


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
    whole, own = sum(run.row_bytes.values()), sum(run.row_bytes[name] for name in run.own)
    reads, remote = run.ranks / run.share * own / whole, cfg.d_model is None and "://" in cfg.store.url
    reads = reads if remote else max(1.0, reads / cfg.nproc)
    bytes_per_token = whole * run.tokens.read_positions / run.tokens.num_tokens
    of_a_machine = bytes_per_token * reads / cfg.nodes
    return {
        "gflop_per_token": per_token / 1e9,
        "tokens_per_s": speed,
        "basis": basis,
        "seconds": speed and tokens / speed,
        "read_bytes_per_token": bytes_per_token,
        "read_bytes": tokens * bytes_per_token * reads,
        "reads": reads,
        "read_mb_s": speed and speed * of_a_machine / 1e6,
        "disk_tokens_per_s": cfg.disk_mb_s and cfg.disk_mb_s * 1e6 / of_a_machine,
    }


def measured_seconds(run: PlannedRun) -> float:
    """Median seconds of a step of one rank on this machine, on random activations."""
    if run.cuda and not torch.cuda.is_available():
        raise GranaryError("measure=true with device.name=cuda, but torch sees no CUDA device: give tflops=... instead")
    parallel = run.cfg.parallel
    if parallel.layout is LayoutKind.fsdp:  # which computes the same, from rows that messages bring
        parallel = replace(parallel, layout=LayoutKind.ddp)
    with run.layout(parallel, torch.device("cuda" if run.cuda else "cpu")) as layout:
        trainer, batch = run.begin(layout)
        for parameter in trainer.objective.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return seconds_per_step(trainer, batch, MEASURED_STEPS)
