"""Train the SAEs that are attached to a model, on what the model computes from the user's batches.

    saes = granary.attach(model, {"layers.2.resid_post": SAEConfig(k=32, expansion=8)})
    granary.fit(saes, batches, tokens=5_000_000)
    saes.save_pretrained(folder)

Trainer, losses, dead latents, schedules, checkpoints and metrics are those of ``granary train``; only the rows come
from a shuffle buffer in the place of a store.
"""

import logging
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

import stage_train.config
from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.intervene.attach import Attached
from shared.intervene.folder import folder_name
from shared.intervene.saved import Saved
from shared.launch.compose import composed
from shared.lm.places import device_of
from shared.parallel import World, barrier, broadcast_object, init_world, telling_lost_contact
from shared.parallel.stop import StopRequest
from shared.sae.config import DictionaryConfig, SAEConfig
from shared.sae.folder import describe
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import SAE
from stage_train.config import TrainSchema
from stage_train.data.inputs import order_of
from stage_train.data.stream.length import StreamLength
from stage_train.job import check_kernels
from stage_train.online.inputs import BufferedInputs
from stage_train.online.rows import ModelRows, evaluating
from stage_train.online.stream import BUFFERED_BATCHES, BatchesEndedError, BufferedStream
from stage_train.run import Run, finish, write_config
from stage_train.show.progress import ProgressBar
from stage_train.spec import RunSpec, on_device, tell_replaced_types
from stage_train.state.lock import only_run_in
from stage_train.state.resume import Start
from stage_train.step.layouts import Layout, make_layout
from stage_train.step.loop import Loop

log = logging.getLogger(__name__)

# Keys of `granary train` that the arguments of `attach` and `fit` say, or that are about a store.
ELSEWHERE = {
    *("hook", "reads", "writes", "at_layer", "sae", "out_dir", "run_dir", "sae_name", "name", "nproc", "packed"),
    *("schedule.tokens", "schedule.epochs", "sae.expansion"),
    *(f"sae.{field.name}" for field in fields(DictionaryConfig)),
}
STREAM = ("stream.batch_size", "stream.seed")


def fit(
    saes: Attached,
    batches: Iterable[Any],
    *,
    tokens: int,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    buffer_rows: int | None = None,
) -> dict[str, dict[str, float | int]]:
    """Train every SAE of `saes` that was given as an SAEConfig, all from the same forwards; returns their last metrics.

    `batches`: what the model is called with, one after the other: a mapping of named arguments, a tuple of arguments,
    or the only one. A list or a DataLoader is gone through again as often as needed, an iterator once.
    `tokens`: rows that each SAE learns from. `overrides`: keys of ``granary train``, as on its command line.
    `folder`: where checkpoints, metrics and each SAE go; the same call continues from the last checkpoint there. None:
    nothing is kept beside the SAEs. `buffer_rows`: rows that are shuffled at a time; None: 64 batches.

    The model is run without gradient and in evaluation mode; its parameters, buffers and modes are afterwards what they
    were. Raises GranaryError for settings that make no sense and when training diverges or `batches` end early; with a
    `folder`, what was learnt is in it then.
    """
    check(saes, tokens, overrides)
    cfgs = configurations(saes.untrained, tokens, overrides)
    world = init_world(cfgs[0].device.name, cfgs[0].device.threads)
    with ExitStack() as stack:
        stack.enter_context(telling_lost_contact())
        if folder is None and world.is_main:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        where = Path(broadcast_object(folder) or "")
        inside = [where / folder_name(name, number) for number, name in enumerate(saes.untrained)]
        pairs = zip(cfgs, inside, strict=True)
        tell_replaced_types(cfgs, world.device)
        cfgs = [replace(on_device(cfg, world.device), out_dir=str(out_dir)) for cfg, out_dir in pairs]
        for out_dir in inside:
            stack.enter_context(only_run_in(out_dir, world))
        metrics = Fitting(saes, batches, cfgs, world, buffer_rows).execute(stack)
        barrier()  # every process has read what the first wrote
        return metrics


class Fitting:
    """One call of `fit`."""

    def __init__(
        self,
        saes: Attached,
        batches: Iterable[Any],
        cfgs: Sequence[TrainSchema],
        world: World,
        buffer_rows: int | None,
    ) -> None:
        self.saes, self.batches, self.cfgs, self.world = saes, batches, cfgs, world
        self.failed: set[Path] = set()
        """Folders of runs that have diverged."""
        self.names, first = list(saes.untrained), cfgs[0]
        self.layout: Layout = make_layout(first.parallel, world)
        if self.layout.stream_world != world.size:
            raise GranaryError(f"parallel={first.parallel.layout.value}: fit is for parallel=ddp or fsdp")
        check_kernels(first.compute.kernels, world)
        self.starts = [Start.find(cfg, world) for cfg in cfgs]
        size, tokens = order_of(first).batch_size, first.schedule.tokens
        assert tokens is not None
        steps = -(-tokens // size)
        self.length = StreamLength(steps, steps * size, (0, steps))
        self.buffer_rows = buffer_rows or max(2, min(BUFFERED_BATCHES, steps)) * size

    def execute(self, stack: ExitStack) -> dict[str, dict[str, float | int]]:
        """Train, save, export, and put the SAEs in their places."""
        if all(start.step >= self.length.steps for start in self.starts):
            widths = [SiteWidths(**start.state["sae"]["widths"]).d_in for start in self.starts]
            specs = [self._spec(*one) for one in zip(self.names, self.cfgs, widths, strict=True)]
        else:
            specs = self._train(stack)
        triples = [one for one in zip(self.names, specs, self.starts, strict=True) if one[1].folder not in self.failed]
        metrics = {name: self._take(name, spec, start) for name, spec, start in triples}
        if self.failed:
            names = ", ".join(name for name in self.names if name not in metrics)
            raise GranaryError(f"training diverged at {names}, see above: lower optim.lr; the other SAEs are trained")
        return metrics

    def _train(self, stack: ExitStack) -> list[RunSpec]:
        state = min(self.starts, key=lambda start: start.step).state.get("stream")
        stack.enter_context(evaluating(self.saes.inner))
        drawn = 0 if state is None else int(state["order"].get("drawn", 0))
        order = order_of(self.cfgs[0])
        stream = BufferedStream(
            ModelRows(self.saes, self.names, self.batches, skip=drawn),
            self.world,
            batch_size=order.batch_size,
            seed=order.seed,
            buffer_rows=self.buffer_rows,
        )
        rows = {name: buffer.all_rows() for name, buffer in stream.buffers.items()}
        specs = [self._spec(*one, rows[one[0]].shape[1]) for one in zip(self.names, self.cfgs, strict=True)]
        inputs = BufferedInputs(rows, record_of(self.saes.inner))
        pairs = [pair for pair in zip(specs, self.starts, strict=True) if pair[1].step < pair[0].length.steps]
        for spec, _ in pairs:
            if self.world.is_main:
                write_config(spec)
        runs = [Run(spec, start, inputs, stream, self.layout) for spec, start in pairs]
        inputs.rows = rows = {}  # the first weights are there
        if state is not None:
            stream.resume(state)
        self._learn(runs, stream)
        return specs

    def _spec(self, name: str, cfg: TrainSchema, width: int) -> RunSpec:
        self.saes.untrained[name].for_width(width)  # says where that is not the one that was asked for
        spec = RunSpec.of(cfg, Sites.of(name), SiteWidths((width,), (width,)), self.length)
        self.layout.check(spec.dictionary, cfg)
        log.info("SAE at %s (%d features): %s", name, width, spec.describe())
        return spec

    def _learn(self, runs: Sequence[Run], stream: BufferedStream) -> None:
        with ExitStack() as stack:
            done = min(run.trainer.progress.tokens for run in runs)
            shown = self.cfgs[0].logger.progress and self.world.is_main
            bar = stack.enter_context(closing(ProgressBar(self.length.tokens, done, enabled=shown)))
            stop = stack.enter_context(StopRequest())
            loop = Loop(runs, stream, None, stop, bar, self.world, alone=len(runs) == 1)
            try:
                stopped = loop.run()
            except BatchesEndedError:
                for run in runs:
                    if 0 < run.step < run.spec.length.steps:
                        run.save()
                loop.wait_for_saves()
                raise
        self.failed = {run.spec.folder for run in runs if run in loop.failed}
        if stopped == "SIGINT":
            raise KeyboardInterrupt
        if stopped is not None:
            sys.exit(0)

    def _take(self, name: str, spec: RunSpec, start: Start) -> dict[str, float | int]:
        """Export a trained SAE and put it in its place."""
        finish(spec, start.checkpoints, self.world)
        made, description = SAE.from_pretrained(spec.folder), describe(spec.folder)
        made = made.to(device_of(self.saes.inner)).requires_grad_(False)
        self.saes.put(name, Saved(made, description.provenance, description.training))
        lines = list(read_metrics(spec.folder))
        return dict(lines[-1]) if lines else {}


def check(saes: Attached, tokens: int, overrides: Sequence[str]) -> None:
    """Raise GranaryError for what can't be trained, or not so."""
    if not saes.is_attached or saes.mode != "observe":
        raise GranaryError('fit needs SAEs that are attached with mode="observe"')
    if not saes.untrained:
        raise GranaryError("every SAE is trained: attach an SAEConfig where one is to be trained")
    if tokens < 1:
        raise GranaryError(f"tokens={tokens}: it must be above 0")
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        group = name.partition(".")[0]
        about_store = group in ("store", "variant", "hydra", "stream") and name not in STREAM
        if name in ELSEWHERE or about_store:
            raise GranaryError(
                f"{override} is not for fit: the SAEConfig, or an argument of attach or fit, says it, or it is about a"
                " store"
            )


def configurations(given: Mapping[str, SAEConfig], tokens: int, overrides: Sequence[str]) -> list[TrainSchema]:
    """The configuration of each run as ``granary train`` composes it; width and folder stay open.

    Raises GranaryError naming a key that is not known or makes no sense.
    """
    stage_train.config.register()
    fixed = ["schedule.epochs=null", f"schedule.tokens={tokens}", "logger.curves=false", "out_dir=."]
    cfgs: list[TrainSchema] = []
    for name, config in given.items():
        cfg = composed("train", [f"sae={config.activation}", *fixed, *overrides])
        assert isinstance(cfg, TrainSchema)
        cfgs.append(replace(cfg, sae=replace(cfg.sae, **dictionary_fields(config)), hook=name))
    return cfgs


def dictionary_fields(config: SAEConfig) -> dict[str, Any]:
    """What an SAEConfig says of the keys of group ``sae``."""
    common = {field.name: getattr(config, field.name) for field in fields(DictionaryConfig) if field.name != "sites"}
    if config.expansion is not None:
        return {**common, "d_latent": None, "expansion": config.expansion}
    return common


def record_of(model: nn.Module) -> dict[str, Any]:
    """The model as a provenance names it: a hub id or folder where it has one, and its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return {"id": name or type(model).__name__, "class": type(model).__name__}
