"""One SAE's run: what its configuration fixes, its trainer, and what it leaves in its folder.

``stage_train.job`` puts runs on a stream; a run does not know whether it is alone on it.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.kernels import resolve
from shared.parallel import World, barrier
from shared.sae import SAE, SAEConfig
from shared.sae.optim.adam8bit import OPTIMISERS
from stage_train.config import OptimSchema, Resume, TrainSchema, as_dict
from stage_train.data.inputs import Feed
from stage_train.data.stores import FrozenStore, choose_hook
from stage_train.data.stream import Batch, TokenStream
from stage_train.data.stream.length import stream_length
from stage_train.show.curves import draw_curves
from stage_train.show.loggers import Logger, make_loggers
from stage_train.state.checkpoint import Checkpoints, read_state
from stage_train.state.export import export, provenance, run_id
from stage_train.state.identity import check_same_run, identity
from stage_train.step.layouts import make_layout
from stage_train.step.schedule import (
    LatentsPerToken,
    LearningRate,
    PenaltyScale,
    length_in_steps,
    peak_rate,
    rate_factors,
)
from stage_train.step.spike_guard import SpikeGuard
from stage_train.step.trainer import Schedules, Trainer
from stage_train.step.weight_average import WeightAverage


class Run:
    """Made in three moments: from its configuration, when the stores are known (`choose`), on a feed (`join`)."""

    trainer: Trainer
    """From `start` on."""

    def __init__(self, cfg: TrainSchema, world: World) -> None:
        """Looks for an earlier part of the same run. Raises GranaryError when the folder holds another one."""
        self.cfg, self.world = cfg, world
        self.folder = Path(cfg.out_dir)
        self.config = as_dict(cfg)
        self.identity = identity(self.config)
        self.checkpoints = Checkpoints(RunFolder(self.folder).checkpoints, keep=cfg.checkpoint.keep, world=world)
        if cfg.checkpoint.resume is Resume.never:
            self.checkpoints.clear()
        self.checkpoint = self.checkpoints.latest()
        """What to continue from, if anything."""
        if self.checkpoint is None and cfg.checkpoint.resume is Resume.must:
            raise GranaryError(f"checkpoint.resume=must, but there is no checkpoint in {self.checkpoints.folder}")
        self.state: Mapping[str, Any] = {} if self.checkpoint is None else read_state(self.checkpoint)
        """What that checkpoint holds beside tensors."""
        if self.checkpoint is not None:
            check_same_run(self.state["identity"], self.identity, self.folder)
        self.step = int(self.state.get("step", 0))
        """Optimiser steps done."""
        self._loggers: list[Logger] = []
        self._open = ExitStack()

    @property
    def id(self) -> str:
        """The same whenever the run is continued."""
        return run_id(self.folder, self.identity)

    @property
    def is_trained(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.length.steps

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_trained and RunFolder(self.folder).has_dictionary

    def choose(self, stores: Sequence[FrozenStore]) -> None:
        """Fix hook, SAE and layout. Raises GranaryError for a hook, a shape or a number of processes that can't be."""
        self.hook = choose_hook(self.cfg.hook, stores)
        self.d_model = stores[0].store.plan.hooks[self.hook]
        self.sae_config: SAEConfig = self.cfg.sae.to_config(self.d_model)
        self.layout = make_layout(self.cfg.parallel, self.world)
        self.layout.num_latents(self.sae_config)  # refuses what does not divide

    def join(self, feed: Feed) -> None:
        """Fix the length and the schedules. Raises GranaryError for those that make no sense."""
        self.feed, cfg = feed, self.cfg.schedule
        self.length = stream_length(feed.data, feed.order, tokens=cfg.tokens, epochs=cfg.epochs)
        # Once more, as sae.dead_after_tokens=auto is a share of the run; whether the rest makes sense is known by now.
        self.sae_config = self.cfg.sae.to_config(self.d_model, self.length.tokens)

        def steps(name: str) -> int:
            return length_in_steps(getattr(cfg, name), self.length.steps, f"schedule.{name}")

        rate = LearningRate(
            peak=peak_rate(self.cfg.optim.lr, self.sae_config.d_latent),
            total_steps=self.length.steps,
            warmup_steps=steps("warmup"),
            decay_steps=steps("decay"),
            shape=cfg.shape.value,
            final=cfg.final,
        )
        k = None
        if cfg.k_start is not None:
            k = LatentsPerToken(
                start=cfg.k_start,
                end=self._final_k(cfg.k_start),
                cold_steps=steps("k_cold"),
                warmup_steps=steps("k_warmup"),
                shape=cfg.k_shape.value,
            )
        self.schedules = Schedules(rate, k, PenaltyScale(warmup_steps=steps("penalty_warmup")))
        self.save_every = length_in_steps(self.cfg.checkpoint.every, self.length.steps, "checkpoint.every")

    def _final_k(self, k_start: int) -> int:
        """Where k ends that begins with `k_start`."""
        sae = self.sae_config
        if sae.k is None:
            raise GranaryError(
                f"schedule.k_start={k_start} with sae.activation={sae.activation}: it has no k; set it to null"
            )
        if k_start > sae.d_latent:
            raise GranaryError(f"schedule.k_start={k_start} is more than the {sae.d_latent} latents: lower it")
        return sae.k

    # ---- what is known before the first step -----------------------------------------------------------------------

    @property
    def num_parameters(self) -> int:
        """Of encoder, decoder and biases."""
        return self.sae_config.d_latent * (2 * self.sae_config.d_model + 1) + self.sae_config.d_model

    @property
    def most_on_disk(self) -> int:
        """Bytes that checkpoints and the exported SAE take at most."""
        return (3 * (self.cfg.checkpoint.keep + 1) + 1) * 4 * self.num_parameters

    def describe(self) -> str:
        """The SAE in one line."""
        sae = self.sae_config
        sparsity = f"k {sae.k}" if sae.k else f"penalty {sae.penalty} {sae.penalty_weight:g}"
        return f"{sae.activation}, {sparsity}, {sae.d_latent:,} latents, {self.num_parameters:,} parameters"

    def write_config(self) -> None:
        """Leave the resolved configuration in the folder."""
        OmegaConf.save(OmegaConf.create(self.config), RunFolder(self.folder).train_config)

    # ---- training --------------------------------------------------------------------------------------------------

    def start(self, stream: TokenStream) -> None:
        """Make the trainer, and fill it from the checkpoint where there is one."""
        self.trainer = self._make_trainer(stream)
        if self.checkpoint is not None:
            self.checkpoints.load(self.checkpoint, self.trainer.tensors())
            self.trainer.restore(self.state)

    def _make_trainer(self, stream: TokenStream) -> Trainer:
        cfg = self.cfg
        generator = torch.Generator().manual_seed(cfg.seed)
        sae = SAE(self.sae_config, kernels=cfg.compute.kernels, compute_dtype=cfg.compute.dtype, generator=generator)
        try:
            resolve(cfg.compute.kernels, torch.empty(0, device=self.world.device))
        except ValueError as error:
            raise GranaryError(f"compute.{error}") from None
        if self.checkpoint is None:
            sae.initialise(self.feed.statistics(self.hook), self.feed.sample(self.hook, cfg.seed))
        sae = self.layout.distribute(sae.to(self.world.device))
        options = optimiser_options(cfg.optim, self.sae_config)
        optimiser = self.layout.optimiser(sae, cfg.optim.kind.value, self.schedules.rate.peak, **options)
        average = None
        if cfg.optim.ema_decay is not None:
            learnt = {name: buffer for name, buffer in sae.named_buffers() if name.startswith("activation.")}
            average = WeightAverage({**optimiser.parameters, **learnt}, cfg.optim.ema_decay)
        elif cfg.optim.ema_export:
            raise GranaryError("optim.ema_export=true needs optim.ema_decay, such as 0.999")
        return Trainer(
            sae,
            optimiser,
            self.schedules,
            stream,
            self.hook,
            self.layout,
            micro_batch=cfg.optim.micro_batch,
            average=average,
            guard=None if cfg.optim.spike_factor is None else SpikeGuard(cfg.optim.spike_factor),
        )

    def open_loggers(self) -> None:
        """Begin to record, on the main process."""
        if self.world.is_main:
            self._loggers = make_loggers(
                self.cfg.logger,
                self.folder,
                first_step=self.step,
                run_id=self.id,
                name=self.cfg.name,
                config=self.config,
            )
        for logger in self._loggers:
            self._open.callback(logger.close)
        self.trainer.reset_clock()

    def learn(self, batch: Batch) -> Mapping[str, float | int] | None:
        """One step; the metrics where it is time to log. Raises GranaryError when training has diverged."""
        self.trainer.step(batch)
        self.step = self.trainer.progress.step
        if self.step % self.cfg.logger.every and not self.is_trained:
            return None
        metrics = self.trainer.read_metrics()
        for logger in self._loggers:
            logger.write(metrics)
        return metrics

    def wants_save(self) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        return self.is_trained or (self.save_every > 0 and self.step % self.save_every == 0)

    def save(self) -> None:
        """Begin to write a checkpoint. Raises GranaryError when training has diverged."""
        self.trainer.check_finite()
        self.checkpoints.save(self.step, self.trainer.tensors(), self._state())

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        stores, progress = self.feed.stores, self.trainer.progress
        return {
            **self.trainer.state(),
            "identity": self.identity,
            "config": self.config,
            "stores": [part.record() for part in stores],
            "world": self.world.size,
            "sae": self.sae_config.to_dict(),
            "export_average": self.cfg.optim.ema_export,
            "provenance": provenance(stores, self.hook, self.identity, progress.step, progress.tokens),
        }

    def close(self) -> None:
        """End recording."""
        self._open.close()

    def finish(self) -> None:
        """Export the SAE and draw the curves; the other ranks wait, or their exit would end the first's."""
        self.close()
        self.checkpoints.wait()
        newest = self.checkpoints.latest()
        assert newest is not None
        if self.world.is_main:
            export(newest, self.folder)
            if self.cfg.logger.curves:
                draw_curves(self.folder)
        barrier()

    def eval_arguments(self, saes: Path) -> str:
        """Of the command that scores `saes`, a folder or a pattern."""
        cfg = self.cfg
        arguments = f"name={cfg.name}" if cfg.run_dir == f"runs/{cfg.name}" else f"run_dir={cfg.run_dir}"
        if saes.resolve() != RunFolder(Path(cfg.run_dir)).sae.resolve():
            arguments += f" sae.path={quoted(str(saes))}"
        if cfg.store.url != f"{cfg.run_dir}/store":
            arguments += f" store.url={cfg.store.url}"
        return arguments


def quoted(value: str) -> str:
    """A value as Hydra and the shell take it, commas and equal signs included."""
    return value if re.fullmatch(r"[\w./:-]+", value) else f"'\"{value}\"'"


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
