"""The run that is planned: its RunSpec, checked as training checks it, and a rank's share of it."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.kernels import resolve
from shared.parallel import World
from shared.sae.sites import Sites
from shared.store.format.dtypes import scales_per_row, storage_type
from stage_train.config import BufferPlace, TrainSchema
from stage_train.data.inputs import order_of
from stage_train.data.sites import resolve_sites, site_formats
from stage_train.data.stores import beside_of, pin, urls_of
from stage_train.data.stream import TrainingData
from stage_train.data.stream.length import StreamLength, stream_length
from stage_train.data.stream.permutation import lanes_per_rank
from stage_train.data.stream.pool import slots_for
from stage_train.estimate.config import PlanSchema
from stage_train.spec import RunSpec
from stage_train.step.layouts.split import latent_parts, latents_per_rank


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is to be read."""

    sites: Sites
    widths: dict[str, int]
    """Of every site."""
    seq_len: int
    dtype: str
    """As stored."""
    training: TrainingData | None
    """None: planned without a store."""

    @property
    def contexts(self) -> int | None:
        """None: more than the stream mixes at a time."""
        return None if self.training is None else self.training.num_contexts

    @property
    def tokens_per_context(self) -> float:
        """Trainable ones, on average."""
        if self.training is None:
            return self.seq_len
        return self.training.num_tokens / max(1, int(np.count_nonzero(self.training.counts)))

    @property
    def mask_bytes(self) -> int:
        """One bit per position, and a count per context."""
        return (self.contexts or 0) * (-(-self.seq_len // 8) + 8)

    @property
    def bytes_per_token(self) -> float:
        """Read from the store for each trainable token: contexts are read whole."""
        size, scales = storage_type(self.dtype).numpy.itemsize, self.dtype == "int8"
        row = sum(width * size + 2 * scales * scales_per_row(width) for width in self.widths.values())
        return row * self.seq_len / self.tokens_per_context


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run as a rank sees it."""

    spec: RunSpec
    data: Data
    ranks: int
    parts: int
    """Into which the latents are split for computing: ranks of a latent group, which read the same rows."""
    latents: int
    """Held by a rank: weights and moments."""
    computed: int
    """That a rank computes: under FSDP all."""
    rows: int
    """Of a rank's batch."""
    micro_rows: int
    slots: int
    """Contexts in the stream's memory."""
    pool_on_device: bool
    cuda: bool
    picks: int
    """Latents of a token that fires most; where their number is free, half of all, as at the start of training."""
    dead: int
    """Dead latents in AuxK, of those that the rank computes."""

    @property
    def layout(self) -> str:
        """Its name."""
        return self.spec.cfg.parallel.layout.value if self.ranks > 1 else "single"

    @property
    def pool_bytes(self) -> list[int]:
        """Of the stream's memory, by site, in the type that the store reads."""
        itemsize = storage_type(self.data.dtype).read.itemsize
        return [self.slots * self.data.seq_len * width * itemsize for width in self.data.widths.values()]


def make_job(cfg: TrainSchema, options: PlanSchema, data: Data) -> PlannedRun:
    """Raises GranaryError where training would, with its words, and for plan options that make no sense."""
    if cfg.nproc < 1 or options.nodes < 1:
        raise GranaryError(f"nproc={cfg.nproc}, nodes={options.nodes}: at least one process")
    if not 0 <= options.dead_fraction <= 1:
        raise GranaryError(f"dead_fraction={options.dead_fraction}: a share of the latents, between 0 and 1")
    ranks, cuda = cfg.nproc * options.nodes, plans_for_cuda(cfg)
    widths = data.sites.widths(data.widths)
    config, _ = cfg.sae.to_configs(cfg.variant, data.sites, widths)
    parts, held = latent_parts(cfg.parallel, ranks), latents_per_rank(config.d_latent, cfg.parallel, ranks)
    replicas = ranks // parts
    lanes, share = lanes_per_rank(cfg.stream.lanes, data.contexts or cfg.stream.lanes, replicas)
    spec = RunSpec.of(cfg, data.sites, widths, length_of(cfg, data))
    rows = math.ceil(cfg.stream.batch_size / replicas)
    if cfg.optim.micro_batch is not None and cfg.optim.micro_batch < 1:
        raise GranaryError(f"optim.micro_batch={cfg.optim.micro_batch}: it must be at least 1, or null")
    context_bytes = data.seq_len * sum(data.widths.values()) * storage_type(data.dtype).read.itemsize
    slots = slots_for(
        share,
        lanes,
        cfg.stream.mix_contexts,
        data.contexts or cfg.stream.lanes * cfg.stream.mix_contexts,
        prefetch_bytes=int(cfg.stream.prefetch_gib * GIB),
        context_bytes=context_bytes,
        world=replicas,
    )
    fits = slots * context_bytes <= (options.memory_gib or 80) * GIB / 4  # as training decides, on an empty GPU
    on_device = fits if cfg.stream.buffer is BufferPlace.auto else cfg.stream.buffer is BufferPlace.device
    computed = config.d_latent // parts
    never_dead = spec.learning.auxk_alpha == 0 or spec.length.tokens <= spec.learning.dead_after_tokens
    return PlannedRun(
        spec=spec,
        data=data,
        ranks=ranks,
        parts=parts,
        latents=held,
        computed=computed,
        rows=rows,
        micro_rows=math.ceil(rows / math.ceil(rows / (cfg.optim.micro_batch or rows))),
        slots=slots,
        pool_on_device=on_device or not cuda,
        cuda=cuda,
        picks=most_picks(spec, options),
        dead=0 if never_dead else round(options.dead_fraction * computed),
    )


def plans_for_cuda(cfg: TrainSchema) -> bool:
    """A machine without a GPU may plan for one that has. Raises GranaryError for names that training does not know."""
    if cfg.device.name not in ("auto", "cpu", "cuda"):
        raise GranaryError(f"device.name={cfg.device.name!r}: choose from auto, cpu, cuda")
    cuda = cfg.device.name == "cuda" or (cfg.device.name == "auto" and torch.cuda.is_available())
    if not (cuda and cfg.compute.kernels == "triton"):
        try:
            resolve(cfg.compute.kernels, torch.empty(0))
        except ValueError as error:
            raise GranaryError(f"compute.{error}") from None
    return cuda


def find_data(cfg: TrainSchema, options: PlanSchema) -> Data:
    """From the store of the configuration, or without one from d_model and seq_len, the same width at every site."""
    if options.d_model is not None:
        for name in ("d_model", "seq_len"):
            if getattr(options, name) < 1:
                raise GranaryError(f"{name}={getattr(options, name)}: must be at least 1")
        reads = _names(cfg.reads if cfg.hook is None else cfg.hook) or ("planned",)
        sites = Sites(reads, _names(cfg.writes) or reads)
        widths = dict.fromkeys(sites.names, options.d_model)
        return Data(sites=sites, widths=widths, seq_len=options.seq_len, dtype=options.store_dtype, training=None)
    try:
        stores = pin(urls_of(cfg), World(0, 1, 0, torch.device("cpu")), beside_of(cfg))
    except GranaryError as error:
        raise GranaryError(f"{error}; or plan without a store: give d_model=... (and seq_len=...)") from error
    sites = resolve_sites(cfg, stores)
    return Data(
        sites=sites,
        widths={name: width for name, (width, _) in site_formats(sites.names, stores).items()},
        seq_len=stores[0].store.plan.seq_len,
        dtype=stores[0].store.plan.dtype,
        training=TrainingData([part.slice for part in stores]),
    )


def _names(value: object) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]


def length_of(cfg: TrainSchema, data: Data) -> StreamLength:
    """Of the run. Raises GranaryError where nobody can say it."""
    tokens, epochs = cfg.schedule.tokens, cfg.schedule.epochs
    if data.training is not None:
        return stream_length(data.training, order_of(cfg), tokens=tokens, epochs=epochs)
    if tokens is None or epochs is not None:
        raise GranaryError("without a store nobody knows how long an epoch is: give schedule.tokens, not epochs")
    if tokens <= 0:
        raise GranaryError(f"schedule.tokens={tokens}: it must be above 0")
    steps = math.ceil(tokens / cfg.stream.batch_size)
    return StreamLength(steps, steps * cfg.stream.batch_size, (0, steps))


def most_picks(spec: RunSpec, options: PlanSchema) -> int:
    """See ``PlannedRun.picks``."""
    config, learning = spec.dictionary, spec.learning
    if config.k is None:
        return config.d_latent // 2
    most = max(config.k, spec.cfg.schedule.k_start or 0)
    if learning.multi_topk_weight > 0:
        most *= learning.multi_topk_factor
    return min(config.d_latent, round(most * (options.fullest_row if config.activation == "batchtopk" else 1)))
