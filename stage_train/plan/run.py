"""The run that is planned, checked as training checks it, as the first of its ranks sees it."""

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._tools import fake_collectives  # noqa: F401 (messages of tensors without memory)
from torch.testing._internal.distributed.fake_pg import FakeStore

from shared.basics.config import named_urls
from shared.basics.errors import GranaryError
from shared.parallel import World, init_world
from shared.store.format.dtypes import row_bytes, storage_type
from stage_train.config import ParallelSchema
from stage_train.data.inputs import SAMPLE_TOKENS
from stage_train.data.kinds import restrict_kinds
from stage_train.data.sites import site_formats
from stage_train.data.stores import PinnedStore, pin, urls_of
from stage_train.data.stream import Batch, TrainingData
from stage_train.data.stream.batch import AnyBatch, ContextBatch
from stage_train.data.stream.sample import SAMPLE_CONTEXTS
from stage_train.job import check_kernels
from stage_train.plan.config import PlanSchema
from stage_train.run import make_objective, put_together
from stage_train.spec import RunSpec
from stage_train.step.layouts import Layout, make_layout
from stage_train.step.trainer import Trainer

CPU = torch.device("cpu")
# Without a store: epochs that a run is planned as at most, of contexts as they will be.
EPOCHS = 1000


class PlannedRun:
    """What it is, as `spec` says, what it reads, and the part of its first rank."""

    def __init__(self, cfg: PlanSchema, tokens: TrainingData | None = None) -> None:
        """`tokens` where they are known already. Raises GranaryError where training would, with its words."""
        # A machine without a GPU may plan for one that has.
        self.cuda = cfg.device.name == "cuda" or init_world(cfg.device.name).device.type == "cuda"
        if self.cuda and cfg.compute.kernels == "triton":
            cfg = replace(cfg, compute=replace(cfg.compute, kernels="auto"))
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # then kernels want values
        self.triton = self.cuda and importlib.util.find_spec("triton") is not None and not interpreted
        """Whether kernels are followed as a GPU runs them; torch's operations, which stand in for them, take more."""
        check_kernels(cfg.compute.kernels, World(0, 1, 0, CPU))
        self.cfg, self.ranks = cfg, cfg.nproc * cfg.nodes
        stores = _open_stores(cfg)
        if tokens is None:
            tokens = TrainingData([part.slice for part in stores])
            restrict_kinds(tokens, stores, cfg.stream.kinds)
        self.tokens = tokens
        self.spec = RunSpec.resolve(cfg, stores, self.tokens)
        self.formats = site_formats(self.spec.sites.names, stores)
        with self.layout(cfg.parallel, CPU) as layout:
            self.share, self.num_latents = layout.stream_world, layout.num_latents(self.spec.dictionary)
            self.own = {name: self.formats[name] for name in layout.sites(self.spec.sites).names}
        """Into how many shares a batch is cut; of the first rank the latents, and width and type of its sites."""
        self.rows = math.ceil(cfg.stream.batch_size / self.share)
        """Of the rank's batch."""
        row = {name: row_bytes(stores[0].store.plan.dtype, width) for name, (width, _) in self.formats.items()}
        self.reads = self.ranks / self.share * sum(row[name] for name in self.own) / sum(row.values())
        """How often a token is read, all ranks together."""
        read = int(np.count_nonzero(self.tokens.counts)) * self.tokens.seq_len
        self.bytes_per_token = sum(row.values()) * read / self.tokens.num_tokens
        """Read from the store for each trainable token: contexts are read whole."""

    @property
    def picks(self) -> int:
        """Latents of the token that fires most; where their number is free, half of all, as at the start."""
        cfg, dictionary, learning = self.cfg, self.spec.dictionary, self.spec.learning
        most: float = max(dictionary.k or 0, cfg.schedule.k_start or 0)
        if getattr(dictionary, "k_scope", "layer") == "all":  # of all groups; what is followed is one's
            most = math.ceil(most / dictionary.num_groups)
        most *= learning.multi_topk_factor if learning.multi_topk_weight > 0 else 1
        most *= cfg.fullest_row if dictionary.activation == "batchtopk" else 1
        return min(round(most) or dictionary.d_latent // 2, dictionary.d_latent)

    @property
    def dead_fraction(self) -> float:
        """Share of the latents that AuxK works on."""
        learning = self.spec.learning
        dies = learning.auxk_alpha > 0 and self.spec.length.tokens > learning.dead_after_tokens
        return self.cfg.dead_fraction if dies else 0.0

    @contextmanager
    def layout(self, parallel: ParallelSchema, device: torch.device) -> Iterator[Layout]:
        """That of the first rank, whose messages go nowhere."""
        dist.init_process_group("fake", rank=0, world_size=self.ranks, store=FakeStore())
        try:
            layout = make_layout(parallel, World(0, self.ranks, 0, device))
            layout.check(self.spec.dictionary, self.cfg)
            yield layout
        finally:
            dist.destroy_process_group()

    def begin(self, layout: Layout) -> tuple[Trainer, AnyBatch]:
        """The rank's trainer, made as training makes it, and its rows of a batch, which are random."""
        device, is_token = layout.world.device, self.spec.sites.unit == "token"
        T = None if is_token else self.tokens.seq_len
        sample = min(SAMPLE_TOKENS, (SAMPLE_CONTEXTS if is_token else self.tokens.num_contexts) * self.tokens.seq_len)

        def draw(count: int, place: torch.device) -> AnyBatch:
            """Rows of tokens, or contexts that are one document each, of as many positions."""
            size, shape = self.cfg.stream.batch_size, (count,) if T is None else (max(1, count // T), T)
            rows = {name: torch.randn(*shape, width, device=place) for name, (width, _) in self.own.items()}
            if T is None:
                return Batch(rows, 0, 0, num_tokens=size, most_rows=count)
            documents, counts = (
                torch.from_numpy(np.full(shape, value)) for value in (0, True)
            )  # known, not only shaped
            return ContextBatch(rows, documents, counts, 0, 0, num_tokens=size, most_contexts=shape[0])

        ones = {name: torch.ones(width) for name, (width, _) in self.formats.items()}
        inputs: Any = SimpleNamespace(
            sample=lambda sites, seed: draw(sample, CPU).parts(sites, None)[0],
            statistics=lambda site: SimpleNamespace(mean=ones[site], var=ones[site], mean_norm=1.0),
        )
        objective = make_objective(self.spec, inputs, device, layout, begins=self.cfg.init_from is None)
        objective = layout.distribute(objective)  # and the whole is let go
        trainer = put_together(self.spec, objective, None, layout)  # type: ignore[arg-type]
        return trainer, draw(self.rows, device)


def _open_stores(cfg: PlanSchema) -> list[PinnedStore]:
    """The configuration's, or, where the width is given, what stands for one with all the sites that are named."""
    if cfg.d_model is None:
        try:
            return pin(urls_of(cfg), World(0, 1, 0, CPU), named_urls(cfg.store.beside))
        except GranaryError as error:
            raise GranaryError(f"{error}; or plan without a store: give d_model=... (and seq_len=...)") from error
    tokens = cfg.schedule.tokens
    if tokens is None or cfg.schedule.epochs is not None:
        raise GranaryError("without a store nobody knows how long an epoch is: give schedule.tokens, no epochs")
    sides = [[side] if isinstance(side, str) else side or [] for side in (cfg.hook, cfg.reads, cfg.writes)]
    names = [name for side in sides for name in side] or ["planned"]
    if cfg.layers is None and any("*" in name for name in names):
        raise GranaryError(f"{names[0]}: without a store nobody knows how many layers that is: give layers=...")
    contexts = max(cfg.stream.lanes * cfg.stream.mix_contexts, math.ceil(tokens / cfg.seq_len / EPOCHS))
    store: Any = SimpleNamespace(
        url="no store",
        hooks=[name.replace("*", str(layer)) for name in names for layer in range(cfg.layers or 1)],
        plan=SimpleNamespace(dtype=cfg.store_dtype),
        seq_len=cfg.seq_len,
        width=lambda hook: cfg.d_model,
        dtype_of=lambda hook: storage_type(cfg.store_dtype).read,
        shard_contexts=lambda shard: range(contexts),
        mask=lambda contexts: np.ones((len(contexts), cfg.seq_len), np.bool_),
    )
    return [PinnedStore(store, 1.0, (0,))]
