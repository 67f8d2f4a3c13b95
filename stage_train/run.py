"""One training run, from its configuration to the exported SAE."""

import logging
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from shared.errors import GranaryError
from shared.kernels import resolve
from shared.parallel import World, barrier, init_world, shutdown, telling_lost_contact
from shared.sae import SAE, SAEConfig
from shared.sae.optimisers import OPTIMISERS
from shared.store import HookStatistics
from stage_train.average import WeightAverage
from stage_train.checkpoint import Checkpoints, read_state
from stage_train.config import BufferPlace, OnDamage, OptimSchema, Resume, TrainSchema
from stage_train.control import StopRequest
from stage_train.curves import draw_curves
from stage_train.export import export, is_exported, provenance, run_id
from stage_train.frozen import FrozenStore, choose_hook, combined_statistics, freeze, refreeze
from stage_train.layouts import make_layout
from stage_train.loggers import make_loggers
from stage_train.outliers import drop_outliers
from stage_train.progress import ProgressBar
from stage_train.resume import check_same_run, identity
from stage_train.schedule import LatentsPerToken, LearningRate, PenaltyScale, automatic_rate, length_in_steps
from stage_train.spikes import SpikeGuard
from stage_train.stream import StreamOrder, TokenStream, TrainingData
from stage_train.stream.length import stream_length
from stage_train.stream.sample import sample_tokens
from stage_train.trainer import Schedules, Trainer
from stage_train.windowed import StoppedWaiting, windowed

log = logging.getLogger(__name__)

# Tokens that the initialisation looks at.
SAMPLE_TOKENS = 8192
GIB = 1 << 30


def main(cfg: TrainSchema) -> None:
    """Train one SAE as `cfg` says, or continue where an earlier run of the same configuration stopped."""
    world = init_world(cfg.device.name, cfg.device.threads)
    with telling_lost_contact():
        Run(cfg, world).execute()
    shutdown()


@dataclass(frozen=True)
class Start:
    """Where a run begins: stores, and the checkpoint to continue from."""

    stores: list[FrozenStore]
    checkpoint: Path | None
    state: Mapping[str, Any]


def quoted(value: str) -> str:
    """A value as Hydra and the shell take it, commas and equal signs included."""
    return value if re.fullmatch(r"[\w./:-]+", value) else f"'\"{value}\"'"


def optimiser_options(cfg: OptimSchema) -> dict[str, Any]:
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
    return {name: value for name, value in given.items() if value is not None} | {"clip_norm": cfg.clip_norm}


class Run:
    """The parts of one run, put together from its configuration."""

    def __init__(self, cfg: TrainSchema, world: World) -> None:
        """Opens the stores and checks everything that can be wrong before any work. Raises GranaryError."""
        self.cfg, self.world = cfg, world
        self.skip_damaged = cfg.stream.on_damage is OnDamage.skip
        self.folder = Path(cfg.out_dir)
        config = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
        assert isinstance(config, dict)
        self.config: dict[str, Any] = {str(key): value for key, value in config.items()}
        self.identity = identity(self.config)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=cfg.checkpoint.keep, world=world)
        self.start = self._find_start()
        self.hook = choose_hook(cfg.hook, self.start.stores)
        store = self.start.stores[0].store
        self.d_model, self.read_dtype = store.plan.hooks[self.hook], store.read_dtype
        self.sae_config: SAEConfig = cfg.sae.to_config(self.d_model)
        self.layout = make_layout(cfg.parallel, world)
        self.layout.num_latents(self.sae_config)  # refuses what does not divide
        self.window = windowed(self.start.stores, cfg.stream.max_norm_multiple)
        if self.window is not None:
            if world.is_main:
                stream = self.start.state["stream"] if self.start.checkpoint is not None else None
                self.window.begin(run_id(self.folder, self.identity), str(self.folder.resolve()), stream)
            barrier()
            self.window.wait(0)
        self.data = TrainingData([part.source for part in self.start.stores], self.window)
        self.statistics = self._statistics()
        self.order = StreamOrder(
            batch_size=cfg.stream.batch_size,
            seed=cfg.seed,
            lanes=cfg.stream.lanes,
            mix_contexts=cfg.stream.mix_contexts,
            drop_last=cfg.stream.drop_last,
        )
        self.length = stream_length(self.data, self.order, tokens=cfg.schedule.tokens, epochs=cfg.schedule.epochs)
        # Once more, as sae.dead_after_tokens=auto is a share of the run; whether the rest makes sense is known above.
        self.sae_config = cfg.sae.to_config(self.d_model, self.length.tokens)
        self.rate = LearningRate(
            peak=self._peak_rate(),
            total_steps=self.length.steps,
            warmup_steps=length_in_steps(cfg.schedule.warmup, self.length.steps, "schedule.warmup"),
            decay_steps=length_in_steps(cfg.schedule.decay, self.length.steps, "schedule.decay"),
            shape=cfg.schedule.shape.value,
            final=cfg.schedule.final,
        )
        self.k = self._k_schedule()
        warmup = length_in_steps(cfg.schedule.penalty_warmup, self.length.steps, "schedule.penalty_warmup")
        self.penalty = PenaltyScale(warmup_steps=warmup)

    def _peak_rate(self) -> float:
        """The number, or what ``auto`` stands for."""
        lr = self.cfg.optim.lr
        if lr == "auto":
            return automatic_rate(self.sae_config.d_latent)
        if isinstance(lr, str):
            raise GranaryError(f"optim.lr={lr}: give a number, or auto for 2e-4 / sqrt(F / 2^14)")
        return lr

    def _k_schedule(self) -> LatentsPerToken | None:
        """None where k is the config's all along."""
        cfg, sae = self.cfg.schedule, self.sae_config
        if cfg.k_start is None:
            return None
        if sae.k is None:
            raise GranaryError(
                f"schedule.k_start={cfg.k_start} with sae.activation={sae.activation}: it has no k; set it to null"
            )
        if cfg.k_start > sae.d_latent:
            raise GranaryError(f"schedule.k_start={cfg.k_start} is more than the {sae.d_latent} latents: lower it")
        return LatentsPerToken(
            start=cfg.k_start,
            end=sae.k,
            cold_steps=length_in_steps(cfg.k_cold, self.length.steps, "schedule.k_cold"),
            warmup_steps=length_in_steps(cfg.k_warmup, self.length.steps, "schedule.k_warmup"),
            shape=cfg.k_shape.value,
        )

    def execute(self) -> None:
        """Train, save, export. Ends the process with status 0 after a stop signal, when all is saved."""
        self._announce()
        with ExitStack() as stack:
            trainer = self._make_trainer()
            stack.callback(trainer.stream.close)
            if self.start.checkpoint is not None:
                self.checkpoints.load(self.start.checkpoint, trainer.tensors())
                trainer.restore(dict(self.start.state))
                log.info("continuing from step %d of %d", trainer.progress.step, self.length.steps)
                self._release(trainer)
            if trainer.progress.step < self.length.steps or not is_exported(self.folder):
                stopped = self._train(trainer, stack.enter_context(StopRequest()))
                if stopped is not None:
                    log.info(
                        "stopped by %s after step %d of %d; all is saved in %s: the same command continues",
                        stopped,
                        trainer.progress.step,
                        self.length.steps,
                        self.checkpoints.folder,
                    )
                    sys.exit(0)
                self._finish()
            if self.window is not None and self.world.is_main:
                self.window.window.finish()
            if self.world.is_main:
                log.info(
                    "the SAE is in %s; score it with: python -m stage_eval %s", self.folder, self._eval_arguments()
                )

    def _eval_arguments(self) -> str:
        cfg = self.cfg
        arguments = f"name={cfg.name}" if cfg.run_dir == f"runs/{cfg.name}" else f"run_dir={cfg.run_dir}"
        if Path(cfg.out_dir).resolve() != Path(cfg.run_dir, "sae").resolve():
            arguments += f" sae.path={quoted(cfg.out_dir)}"
        if cfg.store.url != f"{cfg.run_dir}/store":
            arguments += f" store.url={cfg.store.url}"
        return arguments

    def _find_start(self) -> Start:
        """The stores as frozen now, or the checkpoint to continue from and the stores as frozen then."""
        first = self.cfg.store
        urls = [(first.url, first.weight), *((other.url, other.weight) for other in first.others)]
        mode = self.cfg.checkpoint.resume
        if mode is Resume.never:
            self.checkpoints.clear()
        latest = self.checkpoints.latest()
        if latest is None:
            if mode is Resume.must:
                raise GranaryError(f"checkpoint.resume=must, but there is no checkpoint in {self.checkpoints.folder}")
            return Start(freeze(urls, self.world), None, {})
        state = read_state(latest)
        check_same_run(state["identity"], self.identity, self.folder)
        return Start(refreeze(urls, state["stores"]), latest, state)

    def _statistics(self) -> HookStatistics:
        """Of the tokens that training reads; leaves out the outliers first where that is asked for."""
        stores, multiple = self.start.stores, self.cfg.stream.max_norm_multiple
        parts = [part.store.statistics(self.hook, part.measured_shards) for part in stores]
        if multiple is not None:
            if not multiple > 0:
                raise GranaryError(f"stream.max_norm_multiple={multiple}: it must be above 0, or null")
            bound = multiple * combined_statistics(stores, parts).median_norm
            parts = drop_outliers(
                self.data, stores, self.hook, parts, bound, self.world, skip_damaged=self.skip_damaged
            )
        return combined_statistics(stores, parts)

    def _make_trainer(self) -> Trainer:
        cfg = self.cfg
        generator = torch.Generator().manual_seed(cfg.seed)
        sae = SAE(self.sae_config, kernels=cfg.compute.kernels, compute_dtype=cfg.compute.dtype, generator=generator)
        try:
            resolve(cfg.compute.kernels, torch.empty(0, device=self.world.device))
        except ValueError as error:
            raise GranaryError(f"compute.{error}") from None
        if self.start.checkpoint is None:
            sample = sample_tokens(
                self.data,
                self.hook,
                self.d_model,
                self.read_dtype,
                SAMPLE_TOKENS,
                cfg.seed,
                skip_damaged=self.skip_damaged,
            )
            sae.initialise(self.statistics, sample)
        sae = self.layout.distribute(sae.to(self.world.device))
        optimiser = self.layout.optimiser(sae, cfg.optim.kind.value, self.rate.peak, **optimiser_options(cfg.optim))
        average = None
        if cfg.optim.ema_decay is not None:
            followed = {**optimiser.parameters, **self._learnt_buffers(sae)}
            average = WeightAverage(followed, cfg.optim.ema_decay)
        elif cfg.optim.ema_export:
            raise GranaryError("optim.ema_export=true needs optim.ema_decay, such as 0.999")
        stream = TokenStream(
            self.data,
            {self.hook: (self.d_model, self.read_dtype)},
            self.order,
            rank=self.layout.stream_rank,
            world=self.layout.stream_world,
            device=self.world.device,
            io_threads=cfg.stream.io_threads,
            prefetch_bytes=int(cfg.stream.prefetch_gib * GIB),
            pool_device=self._pool_device(),
            skip_damaged=self.skip_damaged,
        )
        stream.stop_at(*self.length.end)
        return Trainer(
            sae,
            optimiser,
            Schedules(self.rate, self.k, self.penalty),
            stream,
            self.hook,
            self.layout,
            micro_batch=cfg.optim.micro_batch,
            average=average,
            guard=None if cfg.optim.spike_factor is None else SpikeGuard(cfg.optim.spike_factor),
        )

    def _learnt_buffers(self, sae: SAE) -> dict[str, torch.Tensor]:
        """What is learnt beside the parameters: batchtopk's threshold."""
        return {name: buffer for name, buffer in sae.named_buffers() if name.startswith("activation.")}

    def _pool_device(self) -> torch.device:
        """Where contexts are mixed: on the GPU where it is asked for, or where they fit easily."""
        place, device = self.cfg.stream.buffer, self.world.device
        if place is BufferPlace.device and device.type != "cuda":
            raise GranaryError(f"stream.buffer=device needs a GPU, the device is {device.type}: use auto or host")
        if device.type != "cuda" or place is BufferPlace.host:
            return torch.device("cpu")
        context_bytes = self.data.seq_len * self.d_model * self.read_dtype.itemsize
        most = context_bytes * self.order.lanes * self.order.mix_contexts // self.layout.stream_world
        most += int(self.cfg.stream.prefetch_gib * GIB) // self.layout.stream_world
        free, _ = torch.cuda.mem_get_info(device)
        return device if place is BufferPlace.device or most <= free // 4 else torch.device("cpu")

    def _announce(self) -> None:
        """Say what will be done and written, and refuse when the disk has no room for it."""
        if not self.world.is_main:
            return
        sae, length = self.sae_config, self.length
        parameters = sae.d_latent * (2 * sae.d_model + 1) + sae.d_model
        on_disk = (3 * (self.cfg.checkpoint.keep + 1) + 1) * 4 * parameters
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        log.info(
            "data: %s trainable tokens of %s (d_model %d) in %s contexts of %d",
            f"{self.data.num_tokens:,}",
            self.hook,
            self.d_model,
            f"{self.data.num_contexts:,}",
            self.data.seq_len,
        )
        log.info(
            "SAE: %s, %s, %s latents, %s parameters",
            sae.activation,
            f"k {sae.k}" if sae.k else f"penalty {sae.penalty} {sae.penalty_weight:g}",
            f"{sae.d_latent:,}",
            f"{parameters:,}",
        )
        log.info(
            "run: %s steps of %s tokens, %s in all (%.2f epochs) on %d x %s",
            f"{length.steps:,}",
            f"{self.order.batch_size:,}",
            f"{length.tokens:,}",
            length.tokens / self.data.num_tokens,
            self.world.size,
            self.world.device.type,
        )
        log.info(
            "disk: up to %.1f MiB of checkpoints and weights in %s (%.1f GiB free)",
            on_disk / 2**20,
            self.folder,
            free / GIB,
        )
        if on_disk > free:
            raise GranaryError(
                f"{self.folder} has {free / GIB:.1f} GiB free, checkpoints need up to {on_disk / GIB:.1f} GiB: "
                "lower checkpoint.keep or choose another out_dir"
            )
        OmegaConf.save(OmegaConf.create(self.config), self.folder / "train.yaml")

    def _train(self, trainer: Trainer, stop: StopRequest) -> str | None:
        """All steps that are left; the name of the signal when one ended them early."""
        total = self.length.steps
        save_every = length_in_steps(self.cfg.checkpoint.every, total, "checkpoint.every")
        with ExitStack() as stack:
            loggers = []
            if self.world.is_main:
                loggers = make_loggers(
                    self.cfg.logger,
                    self.folder,
                    first_step=trainer.progress.step,
                    run_id=run_id(self.folder, self.identity),
                    name=self.cfg.name,
                    config=self.config,
                )
            for logger in loggers:
                stack.callback(logger.close)
            enabled = self.cfg.logger.progress and self.world.is_main
            bar = stack.enter_context(
                closing(ProgressBar(self.length.tokens, trainer.progress.tokens, enabled=enabled))
            )
            trainer.reset_clock()
            if self.window is not None:
                self.window.stop_requested = lambda: stop.received is not None
            while True:
                try:
                    batch = next(trainer.stream, None)
                except StoppedWaiting:
                    self.checkpoints.wait()  # of the end of the last block: nothing has happened since
                    return stop.received
                if batch is None:
                    break
                trainer.step(batch)
                step = trainer.progress.step
                bar.advance(batch.num_tokens)
                if step % self.cfg.logger.every == 0 or step == total:
                    metrics = trainer.read_metrics()
                    bar.show(metrics)
                    for logger in loggers:
                        logger.write(metrics)
                halt = stop.agreed(step)
                passed = self.window is not None and batch.index + 1 == trainer.stream.plan(batch.epoch).num_batches
                if step == total or halt or passed or (save_every and step % save_every == 0):
                    trainer.check_finite()
                    self.checkpoints.save(step, trainer.tensors(), self._state(trainer))
                if passed:
                    self.checkpoints.wait()
                    self._release(trainer)
                if halt and step < total:
                    self.checkpoints.wait()
                    return stop.received or "a signal to another process"
            self.checkpoints.wait()
        return None

    def _release(self, trainer: Trainer) -> None:
        """Delete the blocks of a windowed store that the checkpoint on disk (it is where the stream is) has passed."""
        if self.window is not None and self.world.is_main:
            stream = trainer.stream.state_dict()
            ended = stream["batch"] >= trainer.stream.plan(stream["epoch"]).num_batches
            self.window.release(stream["epoch"] + ended)

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {
            **trainer.state(),
            "identity": self.identity,
            "config": self.config,
            "stores": [part.record() for part in self.start.stores],
            "world": self.world.size,
            "sae": self.sae_config.to_dict(),
            "export_average": self.cfg.optim.ema_export,
            "provenance": provenance(
                self.start.stores, self.hook, self.identity, trainer.progress.step, trainer.progress.tokens
            ),
        }

    def _finish(self) -> None:
        """Export the SAE and draw the curves; the other ranks wait, or their exit would end the first's."""
        newest = self.checkpoints.latest()
        assert newest is not None
        if self.world.is_main:
            export(newest, self.folder)
            if self.cfg.logger.curves:
                draw_curves(self.folder)
        barrier()
