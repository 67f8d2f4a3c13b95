"""The harvest: tokens first, then shard after shard of activations, skipping what the store holds already.

Ranks are replicas that share the pending shards; rank 0 also prepares the tokens, prints, and finishes the store.
"""

import itertools
import json
import logging

from shared.lm import load_trunk
from shared.lm.load import DTYPES
from shared.parallel import World, init_world, shutdown
from shared.store import Store, free_bytes, layout
from shared.store.objectio import open_io
from stage_harvest.config import HarvestSchema
from stage_harvest.corpus import read_documents
from stage_harvest.forward import ShardForward
from stage_harvest.plan import HarvestJob, announce, check_length, human_bytes, next_command, staging_dtype
from stage_harvest.progress import Board, HarvestProgress
from stage_harvest.spool import Spool
from stage_harvest.tokenise import tokenise
from stage_harvest.writer import BackgroundWriter

log = logging.getLogger(__name__)


def harvest(cfg: HarvestSchema) -> None:
    """Run the whole stage; raises GranaryError for every wrong input before anything is written."""
    world = init_world(cfg.device.name, cfg.device.threads)
    board = Board(world)
    if world.is_main:
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
    shutdown()


def prepare(job: HarvestJob, world: World) -> Store | None:
    """The store with all its tokens, made or found; None after a dry run."""
    cfg = job.cfg
    free = free_bytes(cfg.store.url)
    existing = find_store(cfg.store.url)
    if existing is not None:
        # The tokens are in place, and an equal plan says that the corpus would give them again.
        store = Store.create(cfg.store.url, job.store_plan(existing.plan.num_contexts), None, None, None)
        committed = sum(record.num_contexts for record in store.committed().values())
        announce(job, store.plan, committed=committed, device=world.device, free=free)
        return None if cfg.dry_run else store
    if cfg.corpus.contexts is not None:
        announce(job, job.store_plan(cfg.corpus.contexts), committed=0, device=world.device, free=free)
        if cfg.dry_run:
            return None
    with Spool(cfg.packing.seq_len, cfg.spool_dir) as spool:
        ids = tokenise(read_documents(job.corpus, cfg.corpus, cfg.seed), job.tokenizer, job.config.vocab_size)
        spool.fill(itertools.islice(job.packer.pack(ids), cfg.corpus.contexts))
        check_length(job, spool.num_contexts)
        plan = job.store_plan(spool.num_contexts)
        if cfg.corpus.contexts is None:
            announce(job, plan, committed=0, device=world.device, free=free)
            if cfg.dry_run:
                return None
        return Store.create(cfg.store.url, plan, spool.array("tokens"), spool.array("mask"), spool.array("segments"))


def find_store(url: str) -> Store | None:
    """The store at `url` if its tokens are complete, else None."""
    if open_io(url).size(layout.extent_tokens_key(0)) is None:
        return None
    return Store.open(url)


def write_shards(job: HarvestJob, store: Store, pending: list[int], world: World, board: Board) -> None:
    """Compute and write this rank's part of the `pending` shards."""
    mine = pending[world.rank :: world.size]
    cfg, plan = job.cfg, store.plan
    todo = sum(len(store.shard_contexts(shard)) for shard in pending)
    context_bytes = sum(plan.context_bytes(hook) for hook in plan.hooks)
    progress = HarvestProgress(
        world, board, contexts=plan.num_contexts, todo=todo, seq_len=plan.seq_len, context_bytes=context_bytes
    )
    if mine:
        layers, last_mlp = job.depth
        trunk = load_trunk(
            cfg.model.path,
            cfg.model.dtype.value,
            num_layers=layers,
            last_mlp=last_mlp,
            device=world.device,
            revision=cfg.model.revision,
            attn_implementation=cfg.model.attn_implementation,
        )
        forward = ShardForward(
            trunk, job.hooks, isolated=job.isolated, batch_contexts=job.batch_contexts, device=world.device
        )
        dtype = staging_dtype(plan, DTYPES[cfg.model.dtype.value])
        with BackgroundWriter(store, dtype, pin=world.device.type == "cuda") as writer:
            for shard in mine:
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
    progress.wait_for_all(sum(len(store.shard_contexts(shard)) for shard in mine))
    progress.close()


def finish(job: HarvestJob, store: Store) -> None:
    """Mark the store complete; say where it is and what to do with it."""
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
