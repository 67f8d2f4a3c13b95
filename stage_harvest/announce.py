"""What a harvest says before it begins: what will be written, how many bytes, is there room; and what comes next."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.basics.units import human_bytes
from shared.launch import commands
from shared.lm.hookpoint import describe_hooks
from shared.store import StorePlan, WindowPlan, bytes_planned
from shared.store.capacity import shard_bytes
from stage_harvest.config import HarvestSchema
from stage_harvest.job import HarvestJob
from stage_harvest.shards.writer import STAGING_SETS

log = logging.getLogger(__name__)

MOST_NAMED = 4  # modules on one line


def described(job: HarvestJob) -> str:
    """The sites in one short line."""
    sites = f"{describe_hooks(job.hooks)}; d_model {job.config.hidden_size}" if job.hooks else ""
    modules = with_widths({str(site.point): site.width for site in job.modules})
    return "; ".join(part for part in (sites, modules) if part)


def with_widths(widths: Mapping[str, int]) -> str:
    """Sites and their widths, the first few of many."""
    names = [f"{site} ({width})" for site, width in widths.items()]
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def announce(job: HarvestJob, plan: StorePlan, *, committed: int, device: torch.device, free: int | None) -> None:
    """Log what will be written; raises GranaryError when it does not fit into `free` bytes (None: unknown).

    `committed` is the number of contexts that the store holds already.
    """
    layers, total = job.depth[0], job.config.num_hidden_layers
    weights = "" if job.cfg.model.quantisation is None else f" with {job.cfg.model.quantisation} weights"
    about = {
        "model": f"{job.identity['id']}, {job.identity['dtype']}{weights} on {device}, {layers} of {total} layers",
        "hooks": described(job),
        "corpus": job.corpus.description,
        "contexts": f"{plan.num_contexts:,} x {plan.seq_len:,} = {plan.num_contexts * plan.seq_len:,} tokens,"
        f" {job.cfg.packing.mode.value} documents, {job.batch_contexts} per forward",
    }
    announce_plan(job.cfg.store.url, plan, about, job.window_bytes, committed=committed, free=free)


def announce_plan(
    url: str, plan: StorePlan, about: dict[str, str], window_bytes: int | None, *, committed: int, free: int | None
) -> None:
    """The same of any harvest: `about` says what is run on what, and comes first."""
    size = sum(plan.context_bytes(hook) for hook in plan.hooks)
    needed = bytes_planned(plan) - committed * (size + 9 * plan.seq_len)
    window = None if window_bytes is None else WindowPlan.of(plan, window_bytes)
    if window is not None:
        kept = bytes_planned(plan) - (plan.num_shards - len(plan.heldout_shards)) * shard_bytes(plan)
        needed = min(needed, kept + window.window_bytes)
    if free is not None and needed > free:
        raise GranaryError(
            f"{url} needs {human_bytes(needed)}, but only {human_bytes(free)} are free:"
            " choose another store.url, fewer corpus.contexts or hooks, or store.dtype=int8"
        )
    staging = min(STAGING_SETS, plan.num_shards) * plan.shard_contexts * size
    room = "" if free is None else f" of {human_bytes(free)} free"
    lines = {
        **about,
        "shards": f"{plan.num_shards:,} of {plan.shard_contexts} contexts, {len(plan.heldout_shards)} held out;"
        f" {plan.dtype}, codec {plan.codec}",
        "to write": f"{human_bytes(needed)}{room}, staging memory {human_bytes(staging)} per writer",
        "store": url,
    }
    if window is not None:
        lines["window"] = (
            f"at most {human_bytes(window.window_bytes)} ahead of training, in {window.num_blocks:,} blocks; start"
            " training on the store while this runs"
        )
    if committed:
        lines["resuming"] = f"{committed:,} contexts are in the store already"
    for name, text in lines.items():
        log.info("%-9s %s", name, text)


def next_command(cfg: HarvestSchema) -> str:
    """The training command for the store that was written."""
    arguments = [commands.override("run_dir", cfg.run_dir)]
    if not RunFolder(Path(cfg.run_dir)).is_own_store(cfg.store.url):
        arguments.append(commands.override("store.url", cfg.store.url))
    return commands.line("train", *arguments)
