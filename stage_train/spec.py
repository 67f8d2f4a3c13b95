"""What a run is, computed once from its configuration, the stores and the tokens that are trained on."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from shared.basics.errors import GranaryError
from shared.kernels import COMPUTE_DTYPES, Compute
from shared.sae.config import DictionaryConfig
from shared.sae.learn.config import LearningConfig
from shared.sae.optim import OptimiserConfig
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import VARIANTS
from stage_train.config import OptimSchema, ScheduleSchema, TrainSchema, as_dict
from stage_train.data.attention import AttentionSource, completed
from stage_train.data.inputs import order_for
from stage_train.data.sites import resolve_sites, site_formats
from stage_train.data.stores import PinnedStore
from stage_train.data.stream import TrainingData
from stage_train.data.stream.length import StreamLength, stream_length
from stage_train.show.loggers import check_loggers
from stage_train.state.export import run_id
from stage_train.state.identity import comparable, identity
from stage_train.step.optimiser import optimiser_config
from stage_train.step.schedule import (
    LatentsPerToken,
    LearningRate,
    PenaltyScale,
    length_in_steps,
    peak_rate,
)
from stage_train.step.spike_guard import SpikeGuard
from stage_train.step.trainer import Schedules
from stage_train.step.weight_average import WeightAverage

log = logging.getLogger(__name__)


def on_device(cfg: TrainSchema, device: torch.device) -> TrainSchema:
    """`cfg` with the type that its products have there, which is part of what fixes the result."""
    if cfg.compute.dtype not in COMPUTE_DTYPES:  # refused where it is used
        return cfg
    return replace(cfg, compute=replace(cfg.compute, dtype=_dtype_on(cfg, device)))


def tell_replaced_types(cfgs: Sequence[TrainSchema], device: torch.device) -> None:
    """Say it where another type was asked for than `on_device` gives; once for all runs."""
    asked = [cfg for cfg in cfgs if cfg.compute.dtype in COMPUTE_DTYPES and cfg.compute.dtype != "auto"]
    if any(cfg.compute.dtype != _dtype_on(cfg, device) for cfg in asked):
        log.warning(
            "compute.dtype=bfloat16: this processor has no instructions for it and would take more than twice as long "
            "as in float32, which is used instead (GRANARY_BFLOAT16=fast in the environment insists)"
        )


def _dtype_on(cfg: TrainSchema, device: torch.device) -> str:
    return Compute(cfg.compute.kernels, cfg.compute.dtype).dtype_for(torch.empty(0, device=device))


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run, complete: nothing of it is found out later."""

    cfg: TrainSchema
    config: Mapping[str, Any]
    """`cfg` in plain types, as ``train.yaml`` holds it."""
    identity: Mapping[str, Any]
    """The keys that fix the result, under dotted names."""
    folder: Path
    sites: Sites
    widths: SiteWidths
    dictionary: DictionaryConfig
    learning: LearningConfig
    num_parameters: int
    """Of encoder, decoder, biases and what the activation learns."""
    optimiser: OptimiserConfig
    length: StreamLength
    schedules: Schedules
    save_every: int
    """Steps between checkpoints; 0 saves at the end alone."""
    attention: AttentionSource | None = None
    """The layer whose attention it has, where it has one."""

    @classmethod
    def resolve(cls, cfg: TrainSchema, stores: Sequence[PinnedStore], data: TrainingData) -> Self:
        """Find out and check everything. Raises GranaryError naming the key that makes no sense; touches no disk."""
        sites = resolve_sites(cfg, stores)
        widths = sites.widths({name: width for name, (width, _) in site_formats(sites.names, stores).items()})
        # What is wrong with the dictionary is told before what is wrong with the length.
        variant, attention = completed(cfg, sites, stores[0].store)
        cfg.sae.to_configs(variant, sites, widths)
        order = order_for(cfg, sites.unit, data.seq_len)
        length = stream_length(data, order, tokens=cfg.schedule.tokens, epochs=cfg.schedule.epochs)
        return cls.of(cfg, sites, widths, length, variant, attention)

    @classmethod
    def of(
        cls,
        cfg: TrainSchema,
        sites: Sites,
        widths: SiteWidths,
        length: StreamLength,
        variant: Mapping[str, Any] | None = None,
        attention: AttentionSource | None = None,
    ) -> Self:
        """Specify a run whose sites and length are known; `variant` is that group, complete (None: as it is).

        Raises GranaryError naming the key that makes no sense.
        """
        config = as_dict(cfg)
        dictionary, learning = cfg.sae.to_configs(
            cfg.variant if variant is None else variant, sites, widths, length.tokens
        )
        with torch.device("meta"):
            made = VARIANTS[dictionary.kind](dictionary, kernels=cfg.compute.kernels, compute_dtype=cfg.compute.dtype)
        check_loggers(cfg.logger)
        check_guards(cfg.optim)
        schedules = make_schedules(cfg.schedule, cfg.optim.lr, dictionary, length.steps)
        return cls(
            cfg=cfg,
            config=config,
            identity=identity(config),
            folder=Path(cfg.out_dir),
            sites=sites,
            widths=widths,
            dictionary=dictionary,
            learning=learning,
            num_parameters=sum(parameter.numel() for parameter in made.parameters()),
            optimiser=optimiser_config(cfg.optim, dictionary, schedules.rate.peak),
            length=length,
            schedules=schedules,
            save_every=length_in_steps(cfg.checkpoint.every, length.steps, "checkpoint.every"),
            attention=attention,
        )

    @property
    def id(self) -> str:
        """The same whenever the run is continued."""
        return run_id(self.folder, comparable(self.identity))

    @property
    def most_on_disk(self) -> int:
        """Bytes that checkpoints and the exported dictionary take at most."""
        return (3 * (self.cfg.checkpoint.keep + 1) + 1) * 4 * self.num_parameters

    def most_picks(self, fullest_row: float) -> int:
        """Latents of the token that fires most; where their number is free, half of all, as at the start.

        `fullest_row`: what it fires over k where each batch has k on average.
        """
        dictionary, learning = self.dictionary, self.learning
        most: float = max(dictionary.k or 0, self.cfg.schedule.k_start or 0)
        if getattr(dictionary, "k_scope", "layer") == "all":  # of all groups; what is followed is one's
            most = math.ceil(most / dictionary.num_groups)
        most *= learning.multi_topk_factor if learning.multi_topk_weight > 0 else 1
        most *= fullest_row if dictionary.activation == "batchtopk" else 1
        return min(round(most) or dictionary.d_latent // 2, dictionary.d_latent)

    def describe(self) -> str:
        """The dictionary in one line."""
        sae, learning = self.dictionary, self.learning
        sparsity = f"k {sae.k}" if sae.k else f"penalty {learning.penalty} {learning.penalty_weight:g}"
        return f"{sae.activation}, {sparsity}, {sae.d_latent:,} latents, {self.num_parameters:,} parameters"


def check_guards(cfg: OptimSchema) -> None:
    """Raise GranaryError for a weight average or a spike guard that makes no sense."""
    if cfg.ema_decay is not None:
        WeightAverage({}, cfg.ema_decay)
    elif cfg.ema_export:
        raise GranaryError("optim.ema_export=true needs optim.ema_decay, such as 0.999")
    if cfg.spike_factor is not None:
        SpikeGuard(cfg.spike_factor)


def make_schedules(cfg: ScheduleSchema, lr: float | str, dictionary: DictionaryConfig, total_steps: int) -> Schedules:
    """The schedules of a run of `total_steps`. Raises GranaryError naming the key of one that makes no sense."""

    def steps(name: str) -> int:
        return length_in_steps(getattr(cfg, name), total_steps, f"schedule.{name}")

    rate = LearningRate(
        peak=peak_rate(lr, dictionary.decoder_rows, total_steps),
        total_steps=total_steps,
        warmup_steps=steps("warmup"),
        decay_steps=steps("decay"),
        shape=cfg.shape.value,
        final=cfg.final,
    )
    k = None
    if cfg.k_start is not None:
        k = LatentsPerToken(
            start=cfg.k_start,
            end=final_k(cfg.k_start, dictionary),
            cold_steps=steps("k_cold"),
            warmup_steps=steps("k_warmup"),
            shape=cfg.k_shape.value,
        )
    return Schedules(rate, k, PenaltyScale(warmup_steps=steps("penalty_warmup")))


def final_k(k_start: int, dictionary: DictionaryConfig) -> int:
    """Where k ends that begins with `k_start`. Raises GranaryError where there is no k, or not so many latents."""
    if dictionary.k is None:
        raise GranaryError(
            f"schedule.k_start={k_start} with sae.activation={dictionary.activation}: it has no k; set it to null"
        )
    if k_start > dictionary.d_latent:
        raise GranaryError(f"schedule.k_start={k_start} is more than the {dictionary.d_latent} latents: lower it")
    return dictionary.k
