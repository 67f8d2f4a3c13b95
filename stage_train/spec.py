"""What a run is, computed once from its configuration, the stores and the tokens that are trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch

from shared.basics.errors import GranaryError
from shared.sae import SAE, SAEConfig
from shared.sae.optim.adam8bit import OPTIMISERS
from shared.sae.sites import Sites, SiteWidths
from stage_train.config import OptimSchema, ScheduleSchema, TrainSchema, as_dict
from stage_train.data.inputs import order_of
from stage_train.data.sites import resolve_sites, site_formats
from stage_train.data.stores import PinnedStore
from stage_train.data.stream import TrainingData
from stage_train.data.stream.length import StreamLength, stream_length
from stage_train.show.loggers import check_loggers
from stage_train.state.export import run_id
from stage_train.state.identity import identity
from stage_train.step.schedule import (
    LatentsPerToken,
    LearningRate,
    PenaltyScale,
    length_in_steps,
    peak_rate,
    rate_factors,
)
from stage_train.step.spike_guard import SpikeGuard
from stage_train.step.trainer import Schedules
from stage_train.step.weight_average import WeightAverage


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
    dictionary: SAEConfig
    num_parameters: int
    """Of encoder, decoder, biases and what the activation learns."""
    optimiser: Mapping[str, Any]
    """Arguments of the optimiser's class, but the rate."""
    length: StreamLength
    schedules: Schedules
    save_every: int
    """Steps between checkpoints; 0 saves at the end alone."""

    @classmethod
    def resolve(cls, cfg: TrainSchema, stores: Sequence[PinnedStore], data: TrainingData) -> Self:
        """Find out and check everything. Raises GranaryError naming the key that makes no sense; touches no disk."""
        config = as_dict(cfg)
        sites = resolve_sites(cfg, stores)
        widths = sites.widths({name: width for name, (width, _) in site_formats(sites.names, stores).items()})
        check_one_site(sites)
        cfg.sae.to_config(widths.d_in)  # what is wrong with it is told before what is wrong with the length
        length = stream_length(data, order_of(cfg), tokens=cfg.schedule.tokens, epochs=cfg.schedule.epochs)
        dictionary = cfg.sae.to_config(widths.d_in, length.tokens)
        with torch.device("meta"):
            made = SAE(dictionary, kernels=cfg.compute.kernels, compute_dtype=cfg.compute.dtype)
        check_loggers(cfg.logger)
        check_guards(cfg.optim)
        return cls(
            cfg=cfg,
            config=config,
            identity=identity(config),
            folder=Path(cfg.out_dir),
            sites=sites,
            widths=widths,
            dictionary=dictionary,
            num_parameters=sum(parameter.numel() for parameter in made.parameters()),
            optimiser=optimiser_options(cfg.optim, dictionary),
            length=length,
            schedules=make_schedules(cfg.schedule, cfg.optim.lr, dictionary, length.steps),
            save_every=length_in_steps(cfg.checkpoint.every, length.steps, "checkpoint.every"),
        )

    @property
    def id(self) -> str:
        """The same whenever the run is continued."""
        return run_id(self.folder, self.identity)

    @property
    def most_on_disk(self) -> int:
        """Bytes that checkpoints and the exported dictionary take at most."""
        return (3 * (self.cfg.checkpoint.keep + 1) + 1) * 4 * self.num_parameters

    def describe(self) -> str:
        """The dictionary in one line."""
        sae = self.dictionary
        sparsity = f"k {sae.k}" if sae.k else f"penalty {sae.penalty} {sae.penalty_weight:g}"
        return f"{sae.activation}, {sparsity}, {sae.d_latent:,} latents, {self.num_parameters:,} parameters"


def check_one_site(sites: Sites) -> None:
    """Raise GranaryError for sites that an SAE can't have: it writes the one site that it reads."""
    if not (sites.is_autoencoder and len(sites.reads) == 1):
        raise GranaryError(f"an SAE reads and writes one site, not {sites}: give hook=...")


def check_guards(cfg: OptimSchema) -> None:
    """Raise GranaryError for a weight average or a spike guard that makes no sense."""
    if cfg.ema_decay is not None:
        WeightAverage({}, cfg.ema_decay)
    elif cfg.ema_export:
        raise GranaryError("optim.ema_export=true needs optim.ema_decay, such as 0.999")
    if cfg.spike_factor is not None:
        SpikeGuard(cfg.spike_factor)


def make_schedules(cfg: ScheduleSchema, lr: float | str, dictionary: SAEConfig, total_steps: int) -> Schedules:
    """The schedules of a run of `total_steps`. Raises GranaryError naming the key of one that makes no sense."""

    def steps(name: str) -> int:
        return length_in_steps(getattr(cfg, name), total_steps, f"schedule.{name}")

    rate = LearningRate(
        peak=peak_rate(lr, dictionary.d_latent),
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


def final_k(k_start: int, dictionary: SAEConfig) -> int:
    """Where k ends that begins with `k_start`. Raises GranaryError where there is no k, or not so many latents."""
    if dictionary.k is None:
        raise GranaryError(
            f"schedule.k_start={k_start} with sae.activation={dictionary.activation}: it has no k; set it to null"
        )
    if k_start > dictionary.d_latent:
        raise GranaryError(f"schedule.k_start={k_start} is more than the {dictionary.d_latent} latents: lower it")
    return dictionary.k


def optimiser_options(cfg: OptimSchema, sae: SAEConfig) -> dict[str, Any]:
    """Arguments of the class; raises GranaryError for a value that it does not take, or lacks."""
    given = {
        "betas": None if cfg.beta1 is None or cfg.beta2 is None else (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
        "momentum": cfg.momentum,
        "moments": None if cfg.moments is None else cfg.moments.value,
    }
    taken = signature(OPTIMISERS[cfg.kind.value]).parameters
    for name, value in given.items():
        key = "beta1 and optim.beta2" if name == "betas" else name
        if (value is not None) != (name in taken):
            need = "needs a value for" if name in taken else "has no"
            raise GranaryError(f"optim.kind={cfg.kind.value} {need} optim.{key}: begin from optim={cfg.kind.value}")
    factors = rate_factors(cfg.decoder_factor, cfg.bias_factor, sae)
    options = {"factors": factors, "clip_norm": cfg.clip_norm}
    return {name: value for name, value in given.items() if value is not None} | options
