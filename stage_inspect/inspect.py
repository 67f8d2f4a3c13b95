"""An inspection from configuration to folder: check, pass over the store, merge, look at the weights, write."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from tqdm import tqdm

from shared.basics.errors import GranaryError
from shared.basics.files import lock_folder, make_folders
from shared.basics.memory import return_freed_blocks
from shared.basics.units import human_bytes, human_time
from shared.basics.waiting import wait_until
from shared.latents.layout import META, NOTES
from shared.latents.meta import Meta
from shared.launch import commands
from shared.parallel import World, barrier, init_world
from shared.sae.variants import Dictionary
from shared.store.io.base import ObjectIO
from shared.store.io.local import LocalIO
from shared.store.io.open import open_io
from stage_inspect.config import InspectSchema
from stage_inspect.finish.finish import finish
from stage_inspect.job import InspectJob
from stage_inspect.memory import estimate
from stage_inspect.scan import parts
from stage_inspect.scan.batches import BatchReader
from stage_inspect.scan.scan import missing_parts, scan
from stage_inspect.scan.settings import Settings

log = logging.getLogger(__name__)


def inspect(cfg: InspectSchema) -> None:
    """Run the stage; raises GranaryError for every wrong input before any long work."""
    return_freed_blocks()
    world = init_world(cfg.device.name, cfg.device.threads)
    job = InspectJob.from_config(cfg)
    dictionary = job.folder.load(world.device)
    settings = job.settings(dictionary)
    identity = job.identity(settings)
    io = open_io(cfg.latents.url)
    if cfg.dry_run:
        if world.is_main:
            announce(job, dictionary, settings)
        return
    with alone(io) if world.is_main else nullcontext():
        if world.is_main:
            prepare(io, identity, overwrite=cfg.latents.overwrite)
            announce(job, dictionary, settings)
        barrier()
        work(io, job, dictionary, settings, identity, world)


def work(
    io: ObjectIO, job: InspectJob, dictionary: Dictionary, settings: Settings, identity: str, world: World
) -> None:
    """This process's share of the parts; the main one then finishes the folder."""
    if is_finished(io, identity):
        if world.is_main:
            log.info("done      %s is finished already", io.url)
        return
    reader = BatchReader(job.store, dictionary, job.folder.sites, settings.window, job.store.isolated)
    missing = missing_parts(io, job, identity)
    tokens = sum(len(job.parts[number]) for number in missing) * job.store.seq_len
    start = time.monotonic()
    with token_bar(tokens // world.size, show=world.is_main) as bar:
        scan(io, job, reader, settings, identity, missing[world.rank :: world.size], bar.update)
    if not world.is_main:
        return
    waiting = lambda: log.info("waiting for the parts of other processes")  # noqa: E731
    wait_until(lambda: not missing_parts(io, job, identity), waiting)
    meta = finish(io, job, dictionary, settings, identity)
    log.info("inspected %s tokens in %s", f"{meta.counts['tokens']:,}", human_time(time.monotonic() - start))
    say_where(io, meta)


def announce(job: InspectJob, dictionary: Dictionary, settings: Settings) -> None:
    """Say what will be inspected, how much work it is, and the memory it takes."""
    store, memory = job.store, estimate(job, dictionary, settings)
    lines = {
        "latents": f"{job.num_latents:,} of {job.folder.path}, on {job.folder.sites}",
        "store": f"{store.url}, {len(job.contexts):,} {job.cfg.split.value} contexts of {store.seq_len} positions",
        "parts": f"{len(job.parts)}, each of which is done once, by any process",
        "logits": f"by the head of {job.model.path}" if job.model else "not looked at",
        "memory": f"{human_bytes(memory.peak)} per process at most ({memory})",
        "output": job.cfg.latents.url,
    }
    for name, text in lines.items():
        log.info("%-9s %s", name, text)


def prepare(io: ObjectIO, identity: str, *, overwrite: bool) -> None:
    """Make the folder ready; raises GranaryError where it holds the latents of other inputs."""
    if io.size(META) is not None and not is_finished(io, identity):
        if not overwrite:
            raise GranaryError(
                f"{io.url} holds the latents of another dictionary, store or settings: give latents.overwrite=true,"
                " or choose another latents.url"
            )
        keep_notes(io)
        io.delete(META)
    if is_finished(io, identity):  # one that was killed between its last file and the removal of its parts
        parts.remove(io)
        return
    try:
        for number in parts.numbers_of(io):
            parts.PartFile.open(io, parts.part_key(number), identity)
    except GranaryError:
        if not overwrite:
            raise
        parts.remove(io)


@contextmanager
def alone(io: ObjectIO) -> Iterator[None]:
    """Hold a folder of this machine; raises GranaryError while another inspection does."""
    if not isinstance(io, LocalIO):
        yield
        return
    make_folders(io.root)
    held = lock_folder(io.root)
    if held is None:
        raise GranaryError(f"another inspection is writing {io.url}: let it finish, or stop it")
    try:
        yield
    finally:
        os.close(held)


def keep_notes(io: ObjectIO) -> None:
    """Notes are of the latents they were written on: set them aside under those latents' hash."""
    former = Meta.read(io).dictionary["sha256"][:12]
    if isinstance(io, LocalIO) and (io.root / NOTES).exists():
        (io.root / NOTES).rename(io.root / f"notes-{former}.sqlite")


def is_finished(io: ObjectIO, identity: str) -> bool:
    """Whether the folder is whole, and of these inputs."""
    return io.size(META) is not None and Meta.read(io).settings.get("identity") == identity


def token_bar(total: int, *, show: bool) -> "tqdm[None]":
    """A progress bar that counts tokens."""
    return tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        desc="inspect",
        disable=not show,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )


def say_where(io: ObjectIO, meta: Meta) -> None:
    """Name the folder, its size, and what to do with it."""
    size = sum(size for key, size in io.listing().items() if not key.startswith(NOTES))
    log.info("latents   %s, %s, %d dead", io.url, human_bytes(size), meta.counts["dead"])
    log.info("next      from granary import Latents; Latents.open(%r).top(0)", io.url)
    log.info("next      %s", commands.line("inspect", "find", io.url, "--python", "all"))
