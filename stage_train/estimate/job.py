"""The numbers of one run: from training's own configuration, checked as training checks it, and where there is one from
the store.

The SAE and its optimiser are made on the meta device by the classes that train, so that weights and moments are counted
and not computed from a formula.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.kernels import resolve
from shared.parallel import World
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.config import DictionaryConfig
from shared.sae.learn.config import LearningConfig
from shared.sae.optim import make_optimiser
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import VARIANTS
from shared.store.format.dtypes import scales_per_row, storage_type
from stage_train.config import BufferPlace, LayoutKind, TrainSchema
from stage_train.data.inputs import SAMPLE_TOKENS, order_of
from stage_train.data.sites import resolve_sites
from stage_train.data.stores import pin
from stage_train.data.stream import StreamOrder, TrainingData
from stage_train.data.stream.length import stream_length
from stage_train.data.stream.permutation import lanes_per_rank
from stage_train.data.stream.pool import slots_for
from stage_train.data.stream.sample import SAMPLE_CONTEXTS
from stage_train.estimate.config import PlanSchema
from stage_train.estimate.memory import total_bytes
from stage_train.step.layouts.split import latent_parts, latents_per_rank
from stage_train.step.optimiser import optimiser_config
from stage_train.step.schedule import length_in_steps
from stage_train.step.weight_average import WeightAverage


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is to be read."""

    d_model: int
    seq_len: int
    dtype: str
    """As stored."""
    contexts: int | None
    """None: more than the stream mixes at a time."""
    tokens_per_context: float
    """Trainable ones, on average."""
    training: TrainingData | None

    @property
    def bytes_per_token(self) -> float:
        """Read from the store for each trainable token: contexts are read whole."""
        kind = storage_type(self.dtype)
        row = self.d_model * kind.numpy.itemsize + (2 * scales_per_row(self.d_model) if self.dtype == "int8" else 0)
        return row * self.seq_len / self.tokens_per_context


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run as a rank sees it. Letters as in stage_train.estimate.memory."""

    config: DictionaryConfig
    learning: LearningConfig
    layout: str
    ranks: int
    parts: int
    """Into which the latents are split for computing: ranks of a latent group, which read the same rows."""
    latents: int
    """Held by a rank: weights and moments."""
    rows: int
    """Of a rank's batch."""
    micro_rows: int
    micro_batches: int
    batch_tokens: int
    """All ranks together."""
    steps: int
    tokens: int
    saves_on_the_way: bool
    """A checkpoint is written while a step runs."""
    keep: int
    width: int
    """Picks per row, those of Multi-TopK included; batchtopk: of the fullest row."""
    dead: int
    """Dead latents held."""
    weight_bytes: int
    moment_bytes: int
    average_bytes: int
    slots: int
    """Contexts in the stream's memory."""
    pool_on_device: bool
    cuda: bool
    triton: bool
    """Which kernels run."""
    half_compute: bool
    half_moments: bool
    optimiser: str
    data: Data

    @property
    def d_model(self) -> int:
        return self.config.widths.d_in

    @property
    def all_latents(self) -> int:
        return self.config.d_latent

    @property
    def computed_latents(self) -> int:
        """Latents that a rank computes, with their gradients: under FSDP all, of whose sum it keeps a share."""
        return self.all_latents if self.fsdp else self.latents

    @property
    def fsdp(self) -> bool:
        return self.layout == "fsdp"

    @property
    def activation(self) -> str:
        return self.config.activation

    @property
    def sparse(self) -> bool:
        """The backward pass costs rows times picks."""
        return ACTIVATION_KINDS[self.activation].fixes_l0

    @property
    def pairs_kept(self) -> bool:
        """Gradients stay pairs until the update: in a single process, where nobody else has to see them."""
        return self.ranks == 1

    @property
    def fuses(self) -> bool:
        """The update takes the pairs as they are, by triton and adam with float32 moments."""
        return self.optimiser == "adam" and not self.half_moments

    @property
    def extra_picks(self) -> bool:
        return self.learning.multi_topk_weight > 0

    @property
    def prefixes(self) -> int:
        """Matryoshka groups; 0 without."""
        return len(self.learning.prefixes or ())

    @property
    def tanh(self) -> float:
        """Tensors [n, F] that a tanh penalty keeps."""
        return 0.75 if self.learning.penalty.startswith("tanh") else 0.0

    @property
    def seq_len(self) -> int:
        return self.data.seq_len

    @property
    def contexts(self) -> int | None:
        return self.data.contexts

    @property
    def sample_rows(self) -> int:
        """Tokens that the initialisation looks at."""
        contexts = min(SAMPLE_CONTEXTS, self.contexts or SAMPLE_CONTEXTS)
        return min(SAMPLE_TOKENS, round(contexts * self.data.tokens_per_context))

    @property
    def read_itemsize(self) -> int:
        return storage_type(self.data.dtype).read.itemsize


def make_job(cfg: TrainSchema, options: PlanSchema, data: Data) -> PlannedRun:
    """Raises GranaryError where training would, with its words, and for plan options that make no sense."""
    if cfg.nproc < 1 or options.nodes < 1:
        raise GranaryError(f"nproc={cfg.nproc}, nodes={options.nodes}: at least one process")
    ranks = cfg.nproc * options.nodes
    sites, width = Sites.of("planned"), (data.d_model,)
    config, learning = cfg.sae.to_configs(cfg.variant, sites, SiteWidths(width, width))
    layout = cfg.parallel.layout if ranks > 1 else LayoutKind.ddp
    parts = latent_parts(cfg.parallel, ranks)
    held = latents_per_rank(config.d_latent, cfg.parallel, ranks)
    replicas = ranks // parts
    lanes, share = lanes_per_rank(cfg.stream.lanes, data.contexts or cfg.stream.lanes, replicas)
    order = order_of(cfg)
    steps, tokens = _length(cfg, data, order)
    rows = math.ceil(order.batch_size / replicas)
    micro = cfg.optim.micro_batch or rows
    if micro < 1:
        raise GranaryError(f"optim.micro_batch={micro}: it must be at least 1, or null")
    micro_batches = math.ceil(rows / micro)
    cuda = plans_for_cuda(cfg.device.name)
    weights, moments, average = _state_bytes(cfg, config, held)
    itemsize = storage_type(data.dtype).read.itemsize
    slots = slots_for(
        share,
        lanes,
        cfg.stream.mix_contexts,
        data.contexts or cfg.stream.lanes * cfg.stream.mix_contexts,
        prefetch_bytes=int(cfg.stream.prefetch_gib * GIB),
        context_bytes=data.seq_len * data.d_model * itemsize,
        world=replicas,
    )
    every = length_in_steps(cfg.checkpoint.every, steps, "checkpoint.every")
    return PlannedRun(
        config=config,
        learning=learning,
        layout=layout.value if ranks > 1 else "single",
        ranks=ranks,
        parts=parts,
        latents=held,
        rows=rows,
        micro_rows=math.ceil(rows / micro_batches),
        micro_batches=micro_batches,
        batch_tokens=order.batch_size,
        steps=steps,
        tokens=tokens,
        saves_on_the_way=0 < every < steps,
        keep=cfg.checkpoint.keep,
        width=_width(cfg, config, learning, options),
        dead=_dead(learning, options, tokens, config.d_latent if layout is LayoutKind.fsdp else held),
        weight_bytes=weights,
        moment_bytes=moments,
        average_bytes=average,
        slots=slots,
        pool_on_device=not cuda or _pool_on_device(cfg, options, slots * data.seq_len * data.d_model * itemsize),
        cuda=cuda,
        triton=_uses_triton(cfg.compute.kernels, cuda),
        half_compute=cfg.compute.dtype == "bfloat16",
        half_moments=cfg.optim.moments is not None and cfg.optim.moments.value == "bfloat16",
        optimiser=cfg.optim.kind.value,
        data=data,
    )


def plans_for_cuda(device: str) -> bool:
    """From device.name; a machine without a GPU may plan for one that has. Raises GranaryError for another name."""
    if device not in ("auto", "cpu", "cuda"):
        raise GranaryError(f"device.name={device!r}: choose from auto, cpu, cuda")
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def find_data(cfg: TrainSchema, options: PlanSchema) -> Data:
    """From the store of the configuration, or without one from d_model and seq_len."""
    if options.d_model is not None:
        for name in ("d_model", "seq_len"):
            if getattr(options, name) < 1:
                raise GranaryError(f"{name}={getattr(options, name)}: must be at least 1")
        return Data(
            d_model=options.d_model,
            seq_len=options.seq_len,
            dtype=options.store_dtype,
            contexts=None,
            tokens_per_context=options.seq_len,
            training=None,
        )
    urls = [(cfg.store.url, cfg.store.weight), *((other.url, other.weight) for other in cfg.store.others)]
    try:
        stores = pin(urls, World(0, 1, 0, torch.device("cpu")))
    except GranaryError as error:
        raise GranaryError(f"{error}; or plan without a store: give d_model=... (and seq_len=...)") from error
    sites = resolve_sites(cfg, stores)
    plan = stores[0].store.plan
    training = TrainingData([part.slice for part in stores])
    return Data(
        d_model=sites.widths(plan.hooks).d_in,
        seq_len=plan.seq_len,
        dtype=plan.dtype,
        contexts=training.num_contexts,
        tokens_per_context=training.num_tokens / max(1, int(np.count_nonzero(training.counts))),
        training=training,
    )


def _length(cfg: TrainSchema, data: Data, order: StreamOrder) -> tuple[int, int]:
    """Steps and tokens."""
    if data.training is not None:
        length = stream_length(data.training, order, tokens=cfg.schedule.tokens, epochs=cfg.schedule.epochs)
        return length.steps, length.tokens
    if cfg.schedule.tokens is None or cfg.schedule.epochs is not None:
        raise GranaryError("without a store nobody knows how long an epoch is: give schedule.tokens, not epochs")
    if cfg.schedule.tokens <= 0:
        raise GranaryError(f"schedule.tokens={cfg.schedule.tokens}: it must be above 0")
    steps = math.ceil(cfg.schedule.tokens / order.batch_size)
    return steps, steps * order.batch_size


def _state_bytes(cfg: TrainSchema, config: DictionaryConfig, held: int) -> tuple[int, int, int]:
    """Weights with buffers, moments, and averages of a rank."""
    with torch.device("meta"):
        sae: Any = VARIANTS[config.kind](config, num_latents=held)  # type: ignore[call-arg]
    optimiser = make_optimiser(sae, optimiser_config(cfg.optim, config))
    average = {}
    if cfg.optim.ema_decay is not None:
        average = WeightAverage(optimiser.parameters, cfg.optim.ema_decay).tensors
    parts = (sae.state_dict(), optimiser.state_dict(), average)
    weights, moments, averages = (total_bytes(part.values()) for part in parts)
    return weights, moments, averages


def _uses_triton(kernels: str, cuda: bool) -> bool:
    """Whether the run does; for a GPU elsewhere this machine need not have it."""
    if cuda and kernels in ("auto", "triton"):
        return True
    try:
        return resolve(kernels, torch.empty(0)) == "triton"
    except ValueError as error:
        raise GranaryError(f"compute.{error}") from None


def _width(cfg: TrainSchema, config: DictionaryConfig, learning: LearningConfig, options: PlanSchema) -> int:
    if config.k is None:
        return 0
    most = max(config.k, cfg.schedule.k_start or 0)
    if learning.multi_topk_weight > 0:
        most *= learning.multi_topk_factor
    if config.activation == "batchtopk":
        most = round(most * options.fullest_row)
    return min(most, config.d_latent)


def _dead(learning: LearningConfig, options: PlanSchema, tokens: int, held: int) -> int:
    """Dead latents that AuxK works on; none can be dead before dead_after_tokens have been seen."""
    if not 0 <= options.dead_fraction <= 1:
        raise GranaryError(f"dead_fraction={options.dead_fraction}: a share of the latents, between 0 and 1")
    if learning.auxk_alpha == 0 or tokens <= learning.dead_after_tokens:
        return 0
    return round(options.dead_fraction * held)


def _pool_on_device(cfg: TrainSchema, options: PlanSchema, pool_bytes: int) -> bool:
    """As Run decides, for a GPU of memory_gib (80 where it is not given) that is still empty."""
    if cfg.stream.buffer is not BufferPlace.auto:
        return cfg.stream.buffer is BufferPlace.device
    return pool_bytes <= (options.memory_gib or 80) * GIB / 4
