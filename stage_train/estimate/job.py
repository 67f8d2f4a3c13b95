"""The run that is planned: its RunSpec, checked as training checks it, and the share of one rank."""

import math
from dataclasses import dataclass, replace

import torch

from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.parallel import World, init_world
from shared.sae.variants.clt_part import shares_of
from stage_train.config import BufferPlace, LayoutKind, TrainSchema
from stage_train.data.inputs import order_of
from stage_train.data.stream import Batch, TokenStream
from stage_train.estimate.config import PlanSchema
from stage_train.estimate.data import Data
from stage_train.job import check_kernels
from stage_train.spec import RunSpec
from stage_train.step.layouts.split import latent_parts


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run as the first of its processes sees it."""

    spec: RunSpec
    data: Data
    own: Data
    """What of it a rank reads: all, but for layers."""
    ranks: int
    parts: int
    """Into which the latents are split for computing: ranks that read the same rows."""
    latents: int
    """Of a rank, for computing."""
    rows: int
    """Of the rank's batch."""
    pool_bytes: int
    """Of the contexts in the stream's memory."""
    cuda: bool
    pool_on_device: bool
    picks: int
    """Latents of a token that fires most; where their number is free, half of all, as at the start of training."""
    dead_fraction: float
    """Of the latents, for AuxK."""

    def batch(self, device: torch.device) -> Batch:
        """The rank's rows."""
        rows, tokens = self.own.rows(self.rows, device), self.spec.cfg.stream.batch_size
        return Batch(rows, epoch=0, index=0, num_tokens=tokens, most_rows=self.rows)


def make_job(cfg: TrainSchema, options: PlanSchema, data: Data) -> PlannedRun:
    """Raises GranaryError where training would, with its words."""
    if cfg.nproc < 1:
        raise GranaryError(f"nproc={cfg.nproc}: at least one process")
    # A machine without a GPU may plan for one that has.
    cuda = cfg.device.name == "cuda" or init_world(cfg.device.name).device.type == "cuda"
    if cuda and cfg.compute.kernels == "triton":
        cfg = replace(cfg, compute=replace(cfg.compute, kernels="auto"))
    check_kernels(cfg.compute.kernels, World(0, 1, 0, torch.device("cpu")))
    ranks = cfg.nproc * options.nodes
    parts = latent_parts(cfg.parallel, ranks)
    by_layers = cfg.parallel.layout is LayoutKind.layers and ranks > 1
    own = data.at(shares_of(len(data.sites.reads), ranks, parts)[0].sites(data.sites)) if by_layers else data
    replicas = 1 if by_layers else ranks // parts
    widths = data.sites.widths({name: width for name, (width, _) in data.formats.items()})
    spec = RunSpec.of(cfg, data.sites, widths, data.length)
    learning, stream = spec.learning, cfg.stream
    ahead = int(stream.prefetch_gib * GIB)
    pool_bytes = TokenStream(
        data.tokens, own.formats, order_of(cfg), world=replicas, prefetch_bytes=ahead, pool_device="meta"
    ).buffer_bytes
    fits = pool_bytes <= (options.memory_gib or 80) * GIB / 4  # as training decides, on an empty GPU
    # Those of Multi-TopK's second pass, and of batchtopk's fullest token.
    most = max(spec.dictionary.k or 0, cfg.schedule.k_start or 0)
    if getattr(spec.dictionary, "k_scope", "layer") == "all":  # of all groups, what is counted is one's
        most = math.ceil(most / spec.dictionary.num_groups)
    most *= learning.multi_topk_factor if learning.multi_topk_weight > 0 else 1
    most = round(most * (options.fullest_row if spec.dictionary.activation == "batchtopk" else 1))
    dies = learning.auxk_alpha > 0 and spec.length.tokens > learning.dead_after_tokens
    return PlannedRun(
        spec=spec,
        data=data,
        own=own,
        ranks=ranks,
        parts=parts,
        latents=spec.dictionary.d_latent * replicas // ranks,
        rows=math.ceil(stream.batch_size / replicas),
        pool_bytes=pool_bytes,
        cuda=cuda,
        pool_on_device=not cuda or (fits if stream.buffer is BufferPlace.auto else stream.buffer is BufferPlace.device),
        picks=min(most or spec.dictionary.d_latent // 2, spec.dictionary.d_latent),
        dead_fraction=options.dead_fraction if dies else 0.0,
    )
