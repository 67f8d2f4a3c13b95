"""The run that is planned, checked as training checks it, as the first of its ranks sees it."""

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.basics.config import named_urls
from shared.basics.errors import GranaryError
from shared.parallel import World, init_world
from shared.store.format.dtypes import row_bytes
from stage_train.config import ParallelSchema
from stage_train.data.inputs import SAMPLE_TOKENS
from stage_train.data.kinds import restrict_kinds
from stage_train.data.sites import site_formats
from stage_train.data.stores import PinnedStore, pin, urls_of
from stage_train.data.stream import TrainingData
from stage_train.data.stream.batch import AnyBatch, whole_batch
from stage_train.data.stream.sample import SAMPLE_CONTEXTS
from stage_train.data.unwritten import unwritten_store
from stage_train.job import check_kernels
from stage_train.plan.config import PlanSchema
from stage_train.run import make_objective, put_together
from stage_train.spec import RunSpec
from stage_train.step.layouts import Layout
from stage_train.step.layouts.unconnected import unconnected
from stage_train.step.trainer import Trainer

if TYPE_CHECKING:
    from shared.lm.base_memory import BaseMemory

CPU = torch.device("cpu")


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

    def base(self) -> "BaseMemory | None":
        """The frozen base on the ranks' devices, where one is named; raises GranaryError where it can't be split so."""
        cfg, shared = self.cfg, self.cfg.base_tensor_parallel or self.ranks
        if cfg.base is None:
            return None
        if self.ranks % shared:
            raise GranaryError(f"base_tensor_parallel={shared} does not divide the {self.ranks} ranks")
        from shared.lm.base_memory import base_memory  # brings transformers, whose memory is none of training's

        return base_memory(cfg.base, layer=cfg.base_layer, tensor_parallel=shared, dtype=cfg.base_dtype)

    @contextmanager
    def layout(self, parallel: ParallelSchema, device: torch.device) -> Iterator[Layout]:
        """That of the first rank, whose messages go nowhere."""
        with unconnected(parallel, self.ranks, device) as layout:
            layout.check(self.spec.dictionary, self.cfg)
            yield layout

    def begin(self, layout: Layout) -> tuple[Trainer, AnyBatch]:
        """The rank's trainer, made as training makes it, and its rows of a batch, which are random."""
        device, is_token = layout.world.device, self.spec.sites.unit == "token"
        T = None if is_token else self.tokens.seq_len
        sample = min(SAMPLE_TOKENS, (SAMPLE_CONTEXTS if is_token else self.tokens.num_contexts) * self.tokens.seq_len)

        def draw(count: int, place: torch.device) -> AnyBatch:
            """Rows of tokens, or contexts that are one document each, of as many positions."""
            shape = (count,) if T is None else (max(1, count // T), T)
            rows = {name: torch.randn(*shape, width, device=place) for name, (width, _) in self.own.items()}
            return whole_batch(rows, num_tokens=self.cfg.stream.batch_size)

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
    """The configuration's, or, where the width is given, what stands for one."""
    if cfg.d_model is not None:
        width, length = cfg.d_model, cfg.seq_len
        return [unwritten_store(cfg, d_model=width, seq_len=length, dtype=cfg.store_dtype, layers=cfg.layers)]
    try:
        return pin(urls_of(cfg), World(0, 1, 0, CPU), named_urls(cfg.store.beside))
    except GranaryError as error:
        raise GranaryError(f"{error}; or plan without a store: give d_model=... (and seq_len=...)") from error
