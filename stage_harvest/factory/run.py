"""A harvest of a factory's model: batches counted first, then shard after shard, skipping what the store holds."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from shared.basics.errors import GranaryError
from shared.intervene.attach import Attached, attach
from shared.launch.given import given_keys
from shared.parallel import World, init_world
from shared.parallel.heartbeat import Heartbeat
from shared.sae.config import SAEConfig
from shared.store import Store, StorePlan, free_bytes
from stage_harvest.announce import announce_plan, with_widths
from stage_harvest.config import BatchesCorpus, HarvestSchema
from stage_harvest.factory.made import Made, made_by
from stage_harvest.factory.rows import BatchForward
from stage_harvest.factory.survey import Survey
from stage_harvest.harvest import find_store, finish, report_complete, write_shards
from stage_harvest.job import planned_store, staging_dtype, targets_of, window_bytes
from stage_harvest.progress import HarvestProgress, Notices, tokenise_bar
from stage_harvest.shards.mesh import MeshRank, join_mesh
from stage_harvest.shards.window_gate import WindowGate
from stage_harvest.shards.writer import write_behind
from stage_harvest.tokens.spool import TokenSpool, discard

log = logging.getLogger(__name__)

Maker = Callable[[HarvestSchema, torch.device], Made]
OF_DECODERS = ("hooks.layers", "hooks.sites", "batch_contexts", "model.probe")
FUNCTION_DECIDES = (
    *("model", "model.path", "model.revision", "model.dtype", "model.quantisation", "model.attn_implementation"),
    *("packing", "packing.mode", "packing.bos", "packing.long_documents", "packing.mask_special", "packing.mask_first"),
    "packing.drop_last",
)


@dataclass(frozen=True)
class FactoryJob:
    """A model of the user's with places marked in it, and its batches."""

    cfg: HarvestSchema
    made: Made
    saes: Attached
    """Places without SAEs: what is seen there is all that is wanted."""
    survey: Survey
    place: str

    @property
    def window_bytes(self) -> int | None:
        """The bytes that store.window says. Raises GranaryError for what is no size."""
        return window_bytes(self.cfg)

    def store_plan(self) -> StorePlan:
        """The store's plan; the survey is through."""
        cfg, survey = self.cfg, self.survey
        asked = cfg.corpus.contexts
        if survey.num_contexts == 0 or (asked is not None and survey.num_contexts < asked):
            raise GranaryError(
                f"the batches of {self.made.told} give {survey.num_rows:,} rows, which fill"
                f" {survey.num_contexts} contexts of packing.seq_len={survey.seq_len}"
                + (f": {asked} were asked for by corpus.contexts" if asked is not None else "")
            )
        return planned_store(
            cfg,
            survey.num_contexts,
            survey.widths,
            provenance={
                **self.made.record(),
                "corpus": {
                    "description": self.made.corpus,
                    "fingerprint": survey.fingerprint(),
                    "contexts": asked,
                    "seed": cfg.seed,
                },
            },
            versions=self.made.versions(),
        )

    def announce(self, plan: StorePlan, *, committed: int, device: torch.device) -> None:
        """Log what will be written; raises GranaryError where it does not fit."""
        survey = self.survey
        about = {
            "model": f"{type(self.made.model).__name__} of {self.made.name} on {device}",
            "hooks": with_widths(survey.widths),
            "corpus": f"{len(survey.batches):,} batches, {survey.examples:,} examples",
            "contexts": f"{plan.num_contexts:,} x {plan.seq_len:,} rows",
        }
        free = free_bytes(self.cfg.store.url)
        announce_plan(self.cfg.store.url, plan, about, self.window_bytes, committed=committed, free=free)


def harvest(cfg: HarvestSchema, make: Maker) -> None:
    """Run the whole stage; raises GranaryError for every wrong input before anything is written."""
    world = init_world(cfg.device.name, cfg.device.threads)
    with Heartbeat(world):
        notices = Notices(world)
        if not world.is_main:
            notices.read("begun")  # a wrong input is reported once: the other ranks end with the main one
        with opened(cfg, make, world) as job:
            if world.is_main:
                notices.post("begun", "")
            run(job, world, notices)


@contextmanager
def opened(cfg: HarvestSchema, make: Maker, world: World) -> Iterator[FactoryJob]:
    """The job, its places marked in the model as long as the context lasts."""
    check(cfg, given_keys())
    made = make(cfg, world.device)
    with attach(made.model, dict.fromkeys(targets_of(cfg.hooks), SAEConfig(k=1, expansion=1))) as saes:
        survey = Survey(made, saes, seed=cfg.seed, seq_len=cfg.packing.seq_len, limit=cfg.corpus.contexts)
        yield FactoryJob(cfg, made, saes, survey, cfg.store.url)


def of_function(cfg: HarvestSchema, device: torch.device) -> Made:
    """What the user's function makes. Raises GranaryError for keys that say of a model what the function decides."""
    assert cfg.model.factory is not None
    if not isinstance(cfg.corpus, BatchesCorpus):
        raise GranaryError("model.factory brings its own batches: say corpus=batches")
    for name in given_keys():
        if name in FUNCTION_DECIDES:
            raise GranaryError(f"{name} does not go with model.factory: the factory decides, leave it out")
    if cfg.corpus.shuffle:
        raise GranaryError("corpus.shuffle does not go with model.factory: its batches come in the order of the seed")
    return made_by(cfg.model.factory, device)


def check(cfg: HarvestSchema, given: list[str]) -> None:
    """Raise GranaryError for settings that only decoders have; `given` are the keys of the command line."""
    if not targets_of(cfg.hooks):
        raise GranaryError(
            "no decoder is harvested here, so hooks.modules says what is kept: a path of model.named_modules(), or a"
            " pattern re:..."
        )
    for name in given:
        if name in OF_DECODERS:
            raise GranaryError(f"{name} is for decoders, which is not what is harvested here: leave it out")
    if cfg.tensor_parallel > 1:
        raise GranaryError("tensor_parallel is for decoders, which is not what is harvested here: use replicas")
    if cfg.packing.seq_len < 1:
        raise GranaryError(f"packing.seq_len={cfg.packing.seq_len}: a context needs a row at least")
    if cfg.corpus.contexts is not None and cfg.corpus.contexts < 1:
        raise GranaryError(f"corpus.contexts={cfg.corpus.contexts}: it must be at least 1, or null for all")


def run(job: FactoryJob, world: World, notices: Notices) -> None:
    """This rank's part: rank 0 makes the store, every rank counts the batches for itself and fills its shards."""
    if world.is_main:
        store = begin(job, world)
        pending = None if store is None else store.pending()
        notices.post("pending", json.dumps(pending))
    else:
        pending = json.loads(notices.read("pending"))
        if pending is None:
            return
        for _ in job.survey.contexts():
            pass
        store = Store.open(job.place)
        store.check_plan(job.store_plan(), job.window_bytes)
    if store is None or pending is None:
        return
    mesh_rank = join_mesh(world, 1)
    write_shards(
        partial(compute_shards, job, store, world.device, mesh_rank), store, pending, world, mesh_rank, notices
    )
    if world.is_main:
        finish(job.cfg, store)


def begin(job: FactoryJob, world: World) -> Store | None:
    """Count the batches, say what will be written, make or find the store; None where nothing is left to do."""
    cfg, survey = job.cfg, job.survey
    existing = find_store(job.place)
    if existing is not None:
        for _ in tokenise_bar(survey.contexts(), cfg.corpus.contexts, survey.seq_len, "count"):
            pass
        plan = job.store_plan()
        existing.check_plan(plan, job.window_bytes)
        committed = sum(record.num_contexts for record in existing.committed().values())
        job.announce(plan, committed=committed, device=world.device)
        if existing.complete:
            if not cfg.dry_run:
                existing.sweep()
            report_complete(cfg, existing.summary())
        if cfg.dry_run or existing.complete:
            return None
        discard(cfg.spool_dir, cfg.store.url)
        return Store.create(job.place, plan, None, None, None, job.window_bytes)
    with TokenSpool(survey.seq_len, cfg.spool_dir, cfg.store.url) as spool:
        spool.fill(tokenise_bar(survey.contexts(), cfg.corpus.contexts, survey.seq_len, "count"))
        plan = job.store_plan()
        job.announce(plan, committed=0, device=world.device)
        if cfg.dry_run:
            return None
        tokens, mask, segments = (spool.array(name) for name in ("tokens", "mask", "segments"))
        return Store.create(job.place, plan, tokens, mask, segments, job.window_bytes)


def compute_shards(
    job: FactoryJob,
    store: Store,
    device: torch.device,
    mesh_rank: MeshRank,
    shards: list[int],
    progress: HarvestProgress,
) -> None:
    """Make `shards`, each written while the next is computed."""
    forward = BatchForward(job.survey)
    gate = WindowGate(store, alone=mesh_rank.tp_mesh is None)
    dtype = staging_dtype(store.plan, torch.float32)
    write_behind(store, gate.let_through(shards), forward.fill, progress, dtype=dtype, pin=device.type == "cuda")
