"""The harvest: tokens first, then shard after shard of activations, skipping what the store holds already.

Replicas of the model share the pending shards; a replica may be several ranks that share its weights. Rank 0 also
prepares the tokens, prints, and finishes the store.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from shared.basics.units import human_bytes, human_time
from shared.lm import load_trunk
from shared.lm.load import DTYPES
from shared.parallel import World, init_world
from shared.parallel.heartbeat import Heartbeat
from shared.store import Store, StorePlan, free_bytes
from shared.store.format import layout
from shared.store.io.base import ObjectIO
from shared.store.io.open import open_io
from stage_harvest.announce import announce, next_command
from stage_harvest.config import HarvestSchema, PackingMode
from stage_harvest.corpus import CorpusSource, read_documents
from stage_harvest.job import HarvestJob, check_length, staging_dtype
from stage_harvest.progress import HarvestProgress, Notices, tokenise_bar
from stage_harvest.shards.forward import ShardForward
from stage_harvest.shards.mesh import MeshRank, check_mesh, join_mesh
from stage_harvest.shards.pictured import PicturedForward
from stage_harvest.shards.probe import probe
from stage_harvest.shards.window_gate import WindowGate
from stage_harvest.shards.writer import write_behind
from stage_harvest.tokens.encoder import default_workers
from stage_harvest.tokens.spool import TokenSpool, discard

log = logging.getLogger(__name__)


def harvest(cfg: HarvestSchema) -> None:
    """Run the whole stage; raises GranaryError for every wrong input before anything is written."""
    world = init_world(cfg.device.name, cfg.device.threads)
    with Heartbeat(world):
        run(cfg, world, Notices(world))


def run(cfg: HarvestSchema, world: World, notices: Notices) -> None:
    """This rank's part of the stage: rank 0 checks, every rank loads, rank 0 makes the store, every rank fills it."""
    if world.is_main:
        check_mesh(world, cfg.tensor_parallel)
        # The other ranks wait below: a wrong input is reported once, and they end with this rank.
        job = HarvestJob.from_config(cfg)
        has_work = begin(job, world)
        notices.post("has work", json.dumps(has_work))
    else:
        has_work = json.loads(notices.read("has work"))
    if not has_work:
        return
    if not world.is_main:
        job = HarvestJob.from_config(cfg)
    mesh_rank = join_mesh(world, cfg.tensor_parallel)
    trunk = load(job, world.device, mesh_rank)
    isolation = check_isolation(job, trunk, world.device, mesh_rank)
    if world.is_main:
        store = prepare(job, world, isolation)
        # Decided once: ranks that listed the store at different moments would share out different lists.
        pending = store.pending()
        notices.post("pending", json.dumps(pending))
    else:
        pending = json.loads(notices.read("pending"))
        store = Store.open(job.place)
    compute = partial(compute_shards, job, trunk, store, world.device, mesh_rank)
    write_shards(compute, store, pending, world, mesh_rank, notices)
    if world.is_main:
        finish(cfg, store)


def begin(job: HarvestJob, world: World) -> bool:
    """Say what will be written, without a model or a store; False where nothing is left to do, or on a dry run.

    Raises GranaryError where it would not fit, or the URL holds another harvest. A finished store is not written to.
    """
    cfg = job.cfg
    free = free_bytes(cfg.store.url)
    existing = find_store(job.place)
    if existing is not None:
        # The tokens are in place, and an equal plan says that the corpus would give them again.
        plan = job.store_plan(existing.plan.num_contexts, existing=existing.plan)
        existing.check_plan(plan, job.window_bytes)
        committed = sum(record.num_contexts for record in existing.committed().values())
        announce(job, plan, committed=committed, device=world.device, free=free)
        if existing.complete:
            if not cfg.dry_run:
                existing.sweep()
            report_complete(cfg, existing.summary())
        return not cfg.dry_run and not existing.complete
    if job.stored is not None:
        job.stored.check_vocabulary(job.config.vocab_size, cfg.model.path)
        job.stored.compare_tokenizer(cfg.model.path, cfg.model.revision)
    if cfg.corpus.contexts is not None:
        announce(job, job.store_plan(cfg.corpus.contexts), committed=0, device=world.device, free=free)
    elif cfg.dry_run:
        with open_spool(job) as spool:
            plan = pack_corpus(job, spool)
        announce(job, plan, committed=0, device=world.device, free=free)
    return not cfg.dry_run


def load(job: HarvestJob, device: torch.device, mesh_rank: MeshRank) -> PreTrainedModel:
    """The model as far as the deepest hook, before any document is read: hours of tokenising are not lost to it."""
    model = job.cfg.model
    layers, last_mlp = job.depth
    return load_trunk(
        model.path,
        model.dtype.value,
        num_layers=layers,
        last_mlp=last_mlp,
        device=device,
        revision=model.revision,
        attn_implementation=model.attn_implementation,
        tp_mesh=mesh_rank.tp_mesh,
        quantisation=model.quantisation,
    )


def check_isolation(job: HarvestJob, trunk: PreTrainedModel, device: torch.device, mesh_rank: MeshRank) -> str | None:
    """What the store is to say of its packed documents; raises GranaryError where the model does not isolate them.

    One replica probes, all its ranks together; None where nothing is promised (joined documents).
    """
    match job.cfg.packing.mode:
        case PackingMode.joined:
            return None
        case PackingMode.separate:
            return "each document was run alone"
    if not job.cfg.model.probe:
        return "not probed (model.probe=false)"
    return probe(job, trunk, device).summary() if mesh_rank.replica == 0 else None


def prepare(job: HarvestJob, world: World, isolation: str | None) -> Store:
    """The store with all its tokens, made or found."""
    cfg = job.cfg
    existing = find_store(job.place)
    if existing is not None:
        discard(cfg.spool_dir, cfg.store.url)
        plan = job.store_plan(existing.plan.num_contexts, isolation, existing.plan)
        return Store.create(job.place, plan, None, None, None, job.window_bytes)
    if job.stored is not None:
        plan = job.store_plan(job.stored.store.num_contexts, isolation)
        return Store.create(job.place, plan, *job.stored.arrays(), job.window_bytes)
    with open_spool(job) as spool:
        plan = pack_corpus(job, spool, isolation)
        if cfg.corpus.contexts is None:
            announce(job, plan, committed=0, device=world.device, free=free_bytes(cfg.store.url))
        tokens, mask, segments = (spool.array(name) for name in ("tokens", "mask", "segments"))
        return Store.create(job.place, plan, tokens, mask, segments, job.window_bytes, spool.pictures())


def open_spool(job: HarvestJob) -> TokenSpool:
    """Where the contexts wait until the store has them."""
    cfg = job.cfg
    return TokenSpool(cfg.packing.seq_len, cfg.spool_dir, cfg.store.url, pictured=job.vision is not None)


def pack_corpus(job: HarvestJob, spool: TokenSpool, isolation: str | None = None) -> StorePlan:
    """Tokenise the corpus in worker processes and pack it into `spool`, saying how fast; returns the store's plan."""
    cfg = job.cfg
    if job.vision is not None:
        return pack_pictures(job, spool)
    workers = default_workers() if cfg.tokenise_workers is None else cfg.tokenise_workers
    start = time.perf_counter()
    tokeniser = job.tokeniser(workers, spool.encoded)
    with tokeniser.encoder as encoder:
        ids = tokeniser.corpus_ids(job.corpus, cfg.corpus, cfg.seed)
        contexts = itertools.islice(job.packer.pack(ids), cfg.corpus.contexts)
        spool.fill(tokenise_bar(contexts, cfg.corpus.contexts, cfg.packing.seq_len))
    if encoder.reused:
        log.info("%-9s %d batches of documents were tokenised by an earlier run", "resuming", encoder.reused)
    tokens = spool.num_contexts * cfg.packing.seq_len
    seconds = time.perf_counter() - start
    log.info("tokenised %s tokens in %s: %s tokens/s", f"{tokens:,}", human_time(seconds), f"{tokens / seconds:,.0f}")
    check_length(job, spool.num_contexts)
    return job.store_plan(spool.num_contexts, isolation)


def pack_pictures(job: HarvestJob, spool: TokenSpool) -> StorePlan:
    """Read a corpus with images, row by row, into `spool`; returns the store's plan."""
    cfg = job.cfg
    assert isinstance(job.corpus, CorpusSource)
    rows = job.pictured_tokeniser().contexts(read_documents(job.corpus, cfg.corpus, cfg.seed))
    contexts = itertools.islice(rows, cfg.corpus.contexts)
    spool.fill(tokenise_bar(contexts, cfg.corpus.contexts, cfg.packing.seq_len))
    check_length(job, spool.num_contexts)
    return job.store_plan(spool.num_contexts, "each row was run alone")


def find_store(place: str | ObjectIO) -> Store | None:
    """The store at a place if its tokens are complete, else None."""
    if open_io(place).size(layout.extent_tokens_key(0)) is None:
        return None
    return Store.open(place)


def write_shards(
    compute: Callable[[list[int], HarvestProgress], None],
    store: Store,
    pending: list[int],
    world: World,
    mesh_rank: MeshRank,
    notices: Notices,
) -> None:
    """`compute` and write this replica's part of the `pending` shards, showing the progress of all replicas."""
    mine = pending[mesh_rank.replica :: mesh_rank.num_replicas]
    plan = store.plan
    progress = HarvestProgress(
        world,
        notices,
        contexts=plan.num_contexts,
        todo=sum(len(store.shard_contexts(shard)) for shard in pending),
        shard_contexts=plan.shard_contexts,
        seq_len=plan.seq_len,
        context_bytes=sum(plan.context_bytes(hook) for hook in plan.hooks),
        writers=max(1, min(mesh_rank.num_replicas, len(pending))),
    )
    try:
        if mine:
            compute(mine, progress)
        written = sum(len(store.shard_contexts(shard)) for shard in mine) if mesh_rank.part == 0 else 0
        progress.wait_for_all(written)
    finally:
        progress.close()
    if not training_ended(store):
        progress.report()


def training_ended(store: Store) -> bool:
    """Whether shards were left out because the training that a windowed store was made for needs no more."""
    return store.window is not None and store.window.finished and bool(store.pending())


def compute_shards(
    job: HarvestJob,
    trunk: PreTrainedModel,
    store: Store,
    device: torch.device,
    mesh_rank: MeshRank,
    shards: list[int],
    progress: HarvestProgress,
) -> None:
    """Make `shards`, each written while the next is computed."""
    cfg = job.cfg
    is_writer = mesh_rank.part == 0
    gate = WindowGate(store, alone=mesh_rank.tp_mesh is None)
    points = job.points if is_writer else []
    if job.vision is not None:
        forward: ShardForward = PicturedForward(trunk, points, store, job.vision, device)
    else:
        forward = ShardForward(
            trunk, points, packing=cfg.packing.mode, batch_contexts=job.batch_contexts, device=device
        )
    if not is_writer:
        for shard in gate.let_through(shards):
            contexts = store.shard_contexts(shard)
            forward.run(store.tokens(contexts), store.segments(contexts), {}, first_context=contexts.start)
        return

    def fill(
        contexts: range, staging: dict[str, torch.Tensor], advance: Callable[[int], None]
    ) -> torch.cuda.Event | None:
        return forward.run(store.tokens(contexts), store.segments(contexts), staging, advance, contexts.start)

    dtype = staging_dtype(store.plan, DTYPES[cfg.model.dtype.value])
    write_behind(store, gate.let_through(shards), fill, progress, dtype=dtype, pin=device.type == "cuda")


def finish(cfg: HarvestSchema, store: Store) -> None:
    """Mark the store complete; say where it is and what to do with it."""
    if training_ended(store):
        made = store.num_shards - len(store.pending())
        log.info("training has ended: %d of %d shards were made, and no more are needed", made, store.num_shards)
        return
    left_out = set(store.pending())
    if left_out and left_out <= store.passed_shards():
        log.info("%d shards that training had passed were left out; the others are made", len(left_out))
        return
    report_complete(cfg, store.finalize())


def report_complete(cfg: HarvestSchema, summary: dict[str, Any]) -> None:
    """Say where the whole store is, from its final record, and what to do with it."""
    held = len(summary["heldout_shards"])
    log.info(
        "store     %s: %s in %d shards (%d held out), %s trainable tokens",
        cfg.store.url,
        human_bytes(summary["bytes"]),
        summary["shards"],
        held,
        f"{summary['tokens']:,}",
    )
    log.info("next      %s", next_command(cfg))
