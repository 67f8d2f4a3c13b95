"""The harvest: tokens first, then shard after shard of activations, skipping what the store holds already.

Replicas of the model share the pending shards; a replica may be several ranks that share its weights. Rank 0 also
prepares the tokens, prints, and finishes the store.
"""

import itertools
import json
import logging
import time

import torch

from shared.basics.units import human_bytes, human_time
from shared.lm import load_trunk
from shared.lm.load import DTYPES
from shared.parallel import World, init_world
from shared.parallel.heartbeat import Heartbeat
from shared.store import Store, free_bytes
from shared.store.format import layout
from shared.store.io.open import open_io
from stage_harvest.config import HarvestSchema
from stage_harvest.job import HarvestJob, announce, check_length, next_command, staging_dtype
from stage_harvest.progress import Board, HarvestProgress, tokenise_bar
from stage_harvest.shards.forward import ShardForward
from stage_harvest.shards.mesh import Place, check_mesh, take_place
from stage_harvest.shards.window_gate import Room
from stage_harvest.shards.writer import BackgroundWriter
from stage_harvest.tokens.encoder import TextEncoder, default_workers
from stage_harvest.tokens.spool import Spool
from stage_harvest.tokens.tokenise import token_documents

log = logging.getLogger(__name__)


def harvest(cfg: HarvestSchema) -> None:
    """Run the whole stage; raises GranaryError for every wrong input before anything is written."""
    world = init_world(cfg.device.name, cfg.device.threads)
    with Heartbeat(world):
        run(cfg, world, Board(world))


def run(cfg: HarvestSchema, world: World, board: Board) -> None:
    """This rank's part of the stage."""
    if world.is_main:
        check_mesh(world, cfg.tensor_parallel)
        # The other ranks wait below: a wrong input is reported once, and they end with this rank.
        job = HarvestJob.from_config(cfg)
        store = prepare(job, world)
        # Decided once: ranks that listed the store at different moments would share out different lists.
        pending = None if store is None else store.pending()
        board.post("pending", json.dumps(pending))
        if store is not None and pending is not None:
            write_shards(job, store, pending, world, board)
            finish(job, store)
    else:
        pending = json.loads(board.read("pending"))
        if pending is not None:
            write_shards(HarvestJob.from_config(cfg), Store.open(cfg.store.url), pending, world, board)


def prepare(job: HarvestJob, world: World) -> Store | None:
    """The store with all its tokens, made or found; None after a dry run."""
    cfg = job.cfg
    free = free_bytes(cfg.store.url)
    existing = find_store(cfg.store.url)
    if existing is not None:
        # The tokens are in place, and an equal plan says that the corpus would give them again.
        plan = job.store_plan(existing.plan.num_contexts)
        store = Store.create(cfg.store.url, plan, None, None, None, job.window_bytes)
        committed = sum(record.num_contexts for record in store.committed().values())
        announce(job, store.plan, committed=committed, device=world.device, free=free)
        return None if cfg.dry_run else store
    if cfg.corpus.contexts is not None:
        announce(job, job.store_plan(cfg.corpus.contexts), committed=0, device=world.device, free=free)
        if cfg.dry_run:
            return None
    with Spool(cfg.packing.seq_len, cfg.spool_dir, cfg.store.url) as spool:
        pack_corpus(job, spool)
        check_length(job, spool.num_contexts)
        plan = job.store_plan(spool.num_contexts)
        if cfg.corpus.contexts is None:
            announce(job, plan, committed=0, device=world.device, free=free)
            if cfg.dry_run:
                return None
        tokens, mask, segments = (spool.array(name) for name in ("tokens", "mask", "segments"))
        return Store.create(cfg.store.url, plan, tokens, mask, segments, job.window_bytes)


def pack_corpus(job: HarvestJob, spool: Spool) -> None:
    """Tokenise the corpus in worker processes and pack it into `spool`; says how fast."""
    cfg = job.cfg
    workers = default_workers() if cfg.tokenise_workers is None else cfg.tokenise_workers
    start = time.perf_counter()
    with TextEncoder(job.tokenizer.backend_tokenizer.to_str(), workers=workers, folder=spool.encoded) as encoder:
        ids = token_documents(job.corpus, cfg.corpus, cfg.seed, job.tokenizer, job.config.vocab_size, encoder)
        contexts = itertools.islice(job.packer.pack(ids), cfg.corpus.contexts)
        spool.fill(tokenise_bar(contexts, cfg.corpus.contexts, cfg.packing.seq_len))
    if encoder.reused:
        log.info("%-9s %d batches of documents were tokenised by an earlier run", "resuming", encoder.reused)
    tokens = spool.num_contexts * cfg.packing.seq_len
    seconds = time.perf_counter() - start
    log.info("tokenised %s tokens in %s: %s tokens/s", f"{tokens:,}", human_time(seconds), f"{tokens / seconds:,.0f}")


def find_store(url: str) -> Store | None:
    """The store at `url` if its tokens are complete, else None."""
    if open_io(url).size(layout.extent_tokens_key(0)) is None:
        return None
    return Store.open(url)


def write_shards(job: HarvestJob, store: Store, pending: list[int], world: World, board: Board) -> None:
    """Compute and write this replica's part of the `pending` shards, showing the progress of all replicas."""
    place = take_place(world, job.cfg.tensor_parallel)
    mine = pending[place.replica :: place.num_replicas]
    plan = store.plan
    progress = HarvestProgress(
        world,
        board,
        contexts=plan.num_contexts,
        todo=sum(len(store.shard_contexts(shard)) for shard in pending),
        shard_contexts=plan.shard_contexts,
        seq_len=plan.seq_len,
        context_bytes=sum(plan.context_bytes(hook) for hook in plan.hooks),
        writers=max(1, min(place.num_replicas, len(pending))),
    )
    try:
        if mine:
            compute_shards(job, store, mine, world.device, place, progress)
        written = sum(len(store.shard_contexts(shard)) for shard in mine) if place.part == 0 else 0
        progress.wait_for_all(written)
    finally:
        progress.close()
    if not training_ended(store):
        progress.report()


def training_ended(store: Store) -> bool:
    """Whether shards were left out because the training that a windowed store was made for needs no more."""
    return store.window is not None and store.window.finished and bool(store.pending())


def compute_shards(
    job: HarvestJob, store: Store, shards: list[int], device: torch.device, place: Place, progress: HarvestProgress
) -> None:
    """Load the trunk and make `shards`, each written while the next is computed."""
    cfg = job.cfg
    layers, last_mlp = job.depth
    trunk = load_trunk(
        cfg.model.path,
        cfg.model.dtype.value,
        num_layers=layers,
        last_mlp=last_mlp,
        device=device,
        revision=cfg.model.revision,
        attn_implementation=cfg.model.attn_implementation,
        tp_mesh=place.tp_mesh,
        quantisation=cfg.model.quantisation,
    )
    is_writer = place.part == 0
    room = Room(store)
    forward = ShardForward(
        trunk,
        job.hooks if is_writer else [],
        isolated=job.isolated,
        batch_contexts=job.batch_contexts,
        device=device,
    )
    if not is_writer:
        for shard in shards:
            if not room.wait(shard):
                return
            forward.run(store.tokens(store.shard_contexts(shard)), store.segments(store.shard_contexts(shard)), {})
        return
    dtype = staging_dtype(store.plan, DTYPES[cfg.model.dtype.value])
    with BackgroundWriter(store, dtype, pin=device.type == "cuda") as writer:
        for shard in shards:
            if not room.wait(shard):
                break
            contexts = store.shard_contexts(shard)
            staging = writer.staging()
            filled = forward.run(
                store.tokens(contexts),
                store.segments(contexts),
                staging,
                lambda done: progress.advance(done, writer.wait_seconds),
            )
            writer.submit(shard, staging, filled)
        writer.drain()


def finish(job: HarvestJob, store: Store) -> None:
    """Mark the store complete; say where it is and what to do with it."""
    if training_ended(store):
        made = store.num_shards - len(store.pending())
        log.info("training has ended: %d of %d shards were made, and no more are needed", made, store.num_shards)
        return
    summary = store.finalize()
    held = len(summary["heldout_shards"])
    log.info(
        "store     %s: %s in %d shards (%d held out), %s trainable tokens",
        job.cfg.store.url,
        human_bytes(summary["bytes"]),
        summary["shards"],
        held,
        f"{summary['tokens']:,}",
    )
    log.info("next      %s", next_command(job.cfg))
