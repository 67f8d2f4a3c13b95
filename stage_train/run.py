"""One training run, from its configuration to the exported SAE."""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from shared.errors import GranaryError
from shared.parallel import World, init_world
from shared.sae import SAE, SAEAdam, SAEConfig
from stage_train.checkpoint import Checkpoints
from stage_train.config import BufferPlace, Resume, TrainSchema
from stage_train.control import StopRequest
from stage_train.curves import draw_curves
from stage_train.export import export, is_exported, provenance
from stage_train.frozen import FrozenStore, choose_hook, combined_statistics, freeze, refreeze
from stage_train.layout import Replicated
from stage_train.loggers import make_loggers
from stage_train.progress import ProgressBar
from stage_train.resume import check_same_run, identity
from stage_train.schedule import LearningRate, length_in_steps
from stage_train.stream import StreamOrder, TokenStream, TrainingData
from stage_train.stream.length import stream_length
from stage_train.stream.sample import sample_tokens
from stage_train.trainer import Trainer

log = logging.getLogger(__name__)

# Tokens that the initialisation looks at.
SAMPLE_TOKENS = 8192
GIB = 1 << 30


def main(cfg: TrainSchema) -> None:
    """Train one SAE as `cfg` says, or continue where an earlier run of the same configuration stopped."""
    world = init_world(cfg.device.name, cfg.device.threads)
    Run(cfg, world).execute()


@dataclass(frozen=True)
class Start:
    """Where a run begins: stores, and the checkpoint to continue from."""

    stores: list[FrozenStore]
    checkpoint: Path | None
    state: Mapping[str, Any]


class Run:
    """The parts of one run, put together from its configuration."""

    def __init__(self, cfg: TrainSchema, world: World) -> None:
        """Opens the stores and checks everything that can be wrong before any work. Raises GranaryError."""
        self.cfg, self.world = cfg, world
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
        self.layout = Replicated(world)
        self.data = TrainingData([part.source for part in self.start.stores])
        self.order = StreamOrder(
            batch_size=cfg.stream.batch_size,
            seed=cfg.seed,
            lanes=cfg.stream.lanes,
            mix_contexts=cfg.stream.mix_contexts,
            drop_last=cfg.stream.drop_last,
        )
        self.length = stream_length(self.data, self.order, tokens=cfg.schedule.tokens, epochs=cfg.schedule.epochs)
        self.rate = LearningRate(
            peak=cfg.optim.lr,
            total_steps=self.length.steps,
            warmup_steps=length_in_steps(cfg.schedule.warmup, self.length.steps, "schedule.warmup"),
            decay_steps=length_in_steps(cfg.schedule.decay, self.length.steps, "schedule.decay"),
            shape=cfg.schedule.shape.value,
            final=cfg.schedule.final,
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
                self._finish(trainer)
            if self.world.is_main:
                log.info("the SAE is in %s; score it with: python -m stage_eval name=%s", self.folder, self.cfg.name)

    def _find_start(self) -> Start:
        """The stores as frozen now, or the checkpoint to continue from and the stores as frozen then."""
        urls = {self.cfg.store.url: self.cfg.store.weight, **self.cfg.store.others}
        mode = self.cfg.checkpoint.resume
        if mode is Resume.never:
            self.checkpoints.clear()
        latest = self.checkpoints.latest()
        if latest is None:
            if mode is Resume.must:
                raise GranaryError(f"checkpoint.resume=must, but there is no checkpoint in {self.checkpoints.folder}")
            return Start(freeze(urls, self.world), None, {})
        state = self.checkpoints.state(latest)
        check_same_run(state["identity"], self.identity, self.folder)
        return Start(refreeze(urls, state["stores"]), latest, state)

    def _make_trainer(self) -> Trainer:
        cfg = self.cfg
        generator = torch.Generator().manual_seed(cfg.seed)
        sae = SAE(self.sae_config, generator=generator)
        if self.start.checkpoint is None:
            statistics = combined_statistics(self.start.stores, self.hook)
            sample = sample_tokens(self.data, self.hook, self.d_model, self.read_dtype, SAMPLE_TOKENS, cfg.seed)
            sae.initialise(statistics, sample)
        sae = self.layout.distribute(sae.to(self.world.device))
        optimiser = SAEAdam(
            sae, cfg.optim.lr, betas=(cfg.optim.beta1, cfg.optim.beta2), eps=cfg.optim.eps, clip_norm=cfg.optim.clip_norm
        )
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
        )
        stream.stop_at(*self.length.end)
        return Trainer(
            sae, optimiser, self.rate, stream, self.hook, self.layout, micro_batch=cfg.optim.micro_batch
        )
