"""The run that is planned, checked as training checks it, as the first of its ranks sees it."""

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from shared.parallel import World, init_world
from shared.store.format.dtypes import row_bytes
from stage_train.config import ParallelSchema
from stage_train.data.kinds import restrict_kinds
from stage_train.data.sites import site_formats
from stage_train.data.stream import TrainingData
from stage_train.data.stream.batch import AnyBatch
from stage_train.data.unwritten import UnreadInputs, stores_of
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
        stores = stores_of(cfg, cfg.d_model, seq_len=cfg.seq_len, dtype=cfg.store_dtype, layers=cfg.layers)
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
        self.row_bytes = {n: row_bytes(stores[0].store.plan.dtype, width) for n, (width, _) in self.formats.items()}
        """Of a position in the store, by site."""
        revives = self.spec.learning.auxk_alpha > 0 and self.spec.length.tokens > self.spec.learning.dead_after_tokens
        self.dead_fraction = cfg.dead_fraction if revives else 0.0
        """Share of the latents that AuxK works on."""

    def base(self) -> "BaseMemory | None":
        """The frozen base on the ranks' devices, where one is named; raises GranaryError where it can't be split so."""
        cfg, cut, shared = self.cfg, self.cfg.base_layer, self.cfg.base_tensor_parallel
        if cfg.base is None:
            return None
        from shared.lm.base_memory import base_memory  # brings transformers, whose memory is none of training's

        return base_memory(cfg.base, ranks=self.ranks, layer=cut, tensor_parallel=shared, dtype=cfg.base_dtype)

    @contextmanager
    def layout(self, parallel: ParallelSchema, device: torch.device) -> Iterator[Layout]:
        """That of the first rank, whose messages go nowhere."""
        with unconnected(parallel, self.ranks, device) as layout:
            layout.check(self.spec.dictionary, self.cfg)
            yield layout

    def begin(self, layout: Layout) -> tuple[Trainer, AnyBatch]:
        """The rank's trainer, made as training makes it, and its rows of a batch, which are random."""
        device, spec = layout.world.device, self.spec
        inputs: Any = UnreadInputs(self.own, self.formats, unit=spec.sites.unit, tokens=self.tokens)
        objective = make_objective(spec, inputs, device, layout, begins=self.cfg.init_from is None)
        objective = layout.distribute(objective)  # and the whole is let go
        trainer = put_together(spec, objective, None, layout)  # type: ignore[arg-type]
        return trainer, inputs.draw(self.rows, device, num_tokens=self.cfg.stream.batch_size)
