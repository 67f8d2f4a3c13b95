"""One dictionary in training: its trainer, and what it leaves in its folder. Complete when it is made.

``stage_train.job`` puts runs on a stream; a run does not know whether it is alone on it.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from shared.basics.errors import GranaryError
from shared.basics.files import write_text
from shared.basics.run_folder import RunFolder
from shared.launch import commands
from shared.parallel import World, barrier, broadcast_object
from shared.sae.folder import to_document
from shared.sae.learn.init import initialise
from shared.sae.learn.objective import Objective
from stage_train.config import TrainSchema
from stage_train.data.inputs import RunInputs
from stage_train.data.stream import AnyBatch, BatchStream
from stage_train.online.driver import is_in_memory
from stage_train.show.curves import draw_curves
from stage_train.show.loggers import Logger, make_loggers
from stage_train.spec import RunSpec
from stage_train.state.checkpoint import Checkpoints
from stage_train.state.export import export, provenance
from stage_train.state.resume import Start
from stage_train.state.warm_start import copy_weights
from stage_train.step.layouts import Layout
from stage_train.step.spike_guard import SpikeGuard
from stage_train.step.trainer import Trainer
from stage_train.step.weight_average import WeightAverage


class Run:
    """A run that has steps left to make."""

    def __init__(self, spec: RunSpec, start: Start, inputs: RunInputs, stream: BatchStream, layout: Layout) -> None:
        """Makes the trainer, from data or from the checkpoint of `start`; deletes nothing."""
        self.spec, self.start, self.inputs = spec, start, inputs
        self.world: World = layout.world
        self.trainer = make_trainer(spec, inputs, stream, layout, begins=start.checkpoint is None)
        if start.checkpoint is not None:
            start.checkpoints.load(start.checkpoint, self.trainer.tensors())
            self.trainer.restore(start.state)
        self._loggers: list[Logger] = []
        self._recording = ExitStack()
        self._begun = False

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.spec.folder.name

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.trainer.progress.step

    @property
    def is_trained(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.spec.length.steps

    def learn(self, batch: AnyBatch) -> Mapping[str, float | int] | None:
        """One step; the metrics where it is time to log. Raises GranaryError when training has diverged."""
        if not self._begun:
            self._begin()
        self.trainer.step(batch)
        if self.step % self.spec.cfg.logger.every and not self.is_trained:
            return None
        metrics = self.trainer.read_metrics()
        for logger in self._loggers:
            logger.write(metrics)
        return metrics

    def _begin(self) -> None:
        """Before the first step, when nothing is left to check: an earlier run gives way, and recording begins."""
        self._begun = True
        if self.start.discards:
            self.start.checkpoints.set_aside(RunFolder(self.spec.folder).metrics.name)
        if self.world.is_main:
            self._loggers = make_loggers(
                self.spec.cfg.logger,
                self.spec.folder,
                first_step=self.step,
                run_id=self.spec.id,
                name=self.spec.cfg.name,
                config=self.spec.config,
            )
        for logger in self._loggers:
            self._recording.callback(logger.close)
        self.trainer.reset_clock()

    def wants_save(self) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        return self.is_trained or (self.spec.save_every > 0 and self.step % self.spec.save_every == 0)

    def save(self) -> None:
        """Begin to write a checkpoint. Raises GranaryError when training has diverged."""
        self.trainer.check_finite()
        self.start.checkpoints.save(self.step, self.trainer.tensors(), self._state())

    def wait_for_save(self) -> None:
        """Wait until the last checkpoint is on disk."""
        self.start.checkpoints.wait()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        spec, progress = self.spec, self.trainer.progress
        return {
            **self.trainer.state(),
            "identity": spec.identity,
            "config": spec.config,
            "stores": self.inputs.records(),
            "world": self.world.size,
            "sae": to_document(spec.dictionary, spec.learning.to_dict(), {}),
            "decays_from": spec.schedules.rate.decays_from,
            "export_average": spec.cfg.optim.ema_export,
            "provenance": provenance(self.inputs.origin(), spec.sites, spec.identity, progress.step, progress.tokens),
        }

    def close(self) -> None:
        """End recording."""
        self._recording.close()


def make_trainer(spec: RunSpec, inputs: RunInputs, stream: BatchStream, layout: Layout, *, begins: bool) -> Trainer:
    """The trainer of a run, its weights set from data or an SAE, or left unset where a checkpoint fills them.

    Each rank sets its own part; where the layout does not begin in parts, and from an SAE, the first rank alone sets
    them, and hands every rank its part. Raises GranaryError, on all ranks alike, when there is nothing to begin from.
    """
    world = layout.world
    objective: Objective | None = None
    failure: GranaryError | None = None
    if begins and (world.is_main or in_parts(spec, layout)):
        try:
            objective = make_objective(spec, inputs, world.device, layout, begins=True)
        except GranaryError as error:
            failure = error
    line = broadcast_object(str(failure or ""))
    if failure or line:
        raise failure or GranaryError(line)
    if objective is None:
        objective = make_objective(spec, inputs, torch.device("meta"), layout, begins=False)
    objective = layout.distribute(objective, has_values=begins)  # and the whole is let go
    return put_together(spec, objective, stream, layout)


def in_parts(spec: RunSpec, layout: Layout) -> bool:
    """Whether each rank makes its own part of the first weights."""
    return spec.cfg.init_from is None and layout.begins_in_parts(spec.dictionary)


def make_objective(
    spec: RunSpec, inputs: RunInputs, device: torch.device, layout: Layout, *, begins: bool
) -> Objective:
    """What learns, whole or as the layout begins, on `device`, where it is initialised too if the run `begins`: a host
    would take minutes for what a GPU does in seconds, and nothing of the matrices is ever in its memory."""
    cfg = spec.cfg
    generator = torch.Generator().manual_seed(cfg.seed)
    with device:
        objective = layout.objective(
            spec.dictionary,
            spec.learning,
            in_parts=in_parts(spec, layout),
            kernels=cfg.compute.kernels,
            compute_dtype=cfg.compute.dtype,
            generator=generator,
        )
    if begins and cfg.init_from is not None:
        copy_weights(objective.dictionary, cfg.init_from)
    elif begins:
        sites = layout.sites(spec.sites)
        x, y_MD = inputs.sample(sites, cfg.seed)
        reads, writes = ([inputs.statistics(site) for site in side] for side in (sites.reads, sites.writes))
        heads = None
        if spec.attention is not None and getattr(spec.learning, "qk_init", None) == "model":
            from shared.lm.attention import model_heads  # transformers: needed by no other variant

            heads = model_heads(spec.attention.path, spec.attention.revision, spec.attention.layer)
        initialise(objective, reads, x, writes, y_MD, heads=heads)
    return objective


def put_together(spec: RunSpec, objective: Objective, stream: BatchStream, layout: Layout) -> Trainer:
    """The trainer of `objective`, the rank's part on the rank's device."""
    cfg = spec.cfg
    optimiser = layout.optimiser(objective, spec.optimiser)
    average = None
    if cfg.optim.ema_decay is not None:
        roles, buffers = objective.dictionary.roles(), dict(objective.dictionary.named_buffers())
        learnt = {name: buffer for name, buffer in buffers.items() if roles[name].learnt}
        average = WeightAverage({**optimiser.parameters, **learnt}, cfg.optim.ema_decay)
    return Trainer(
        objective,
        optimiser,
        spec.schedules,
        stream,
        layout.sites(spec.sites),
        layout,
        micro_batch=cfg.optim.micro_batch,
        average=average,
        guard=None if cfg.optim.spike_factor is None else SpikeGuard(cfg.optim.spike_factor),
    )


def write_config(spec: RunSpec) -> None:
    """Leave the resolved configuration in the run's folder."""
    spec.folder.mkdir(parents=True, exist_ok=True)
    write_text(RunFolder(spec.folder).train_config, OmegaConf.to_yaml(OmegaConf.create(dict(spec.config))))


def finish(spec: RunSpec, checkpoints: Checkpoints, world: World) -> None:
    """Draw the curves and export the dictionary; the other ranks wait, or their exit would end the first's.

    In this order: a run whose dictionary is there is done, and what fails before is made up for by the next command.
    """
    checkpoints.wait()
    newest = checkpoints.latest()
    assert newest is not None
    if world.is_main:
        if spec.cfg.logger.curves:
            draw_curves(spec.folder)
        export(newest, spec.folder)
        checkpoints.prune(newest)  # a disk that failed may have left older ones
    barrier()


def eval_command(cfg: TrainSchema, saes: Path) -> str:
    """That which scores `saes`, a folder or a pattern; the scores of an SAE of its own name go beside it."""
    is_named = cfg.run_dir == f"runs/{cfg.name}"
    arguments = [commands.override("name", cfg.name) if is_named else commands.override("run_dir", cfg.run_dir)]
    if saes.resolve() != RunFolder(Path(cfg.run_dir)).sae.resolve():
        arguments.append(commands.override("sae.path", str(saes)))
        if saes.parent.resolve() == Path(cfg.run_dir).resolve():
            arguments.append(commands.override("out_dir", str(saes)))
    if not (RunFolder(Path(cfg.run_dir)).is_own_store(cfg.store.url) or is_in_memory()):
        arguments.append(commands.override("store.url", cfg.store.url))
    return commands.line("eval", *arguments)
