"""The work of one process group: one run, or many that learn from the same pass over the store.

All runs of a job read one stream, so what they share (stores, order of tokens, processes) is asked for alike by all.
A job first checks everything, changing nothing; then it says what it will do, claims, trains and exports.
"""

import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from shared.basics.config import named_urls
from shared.basics.disk import telling_disk_errors
from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.kernels import resolve
from shared.parallel import World, broadcast_object, init_world, shutdown, telling_lost_contact
from shared.parallel.stop import StopRequest
from shared.sae.loading import is_intact
from stage_train.config import TrainSchema, as_dict
from stage_train.data.inputs import PinnedTokens, TrainingInputs, order_of
from stage_train.data.sites import resolve_sites
from stage_train.data.stores import PinnedStore, pin, repin, urls_of
from stage_train.online.driver import is_in_memory
from stage_train.run import Run, eval_command, finish, write_config
from stage_train.show.progress import ProgressBar
from stage_train.spec import RunSpec, on_device, tell_replaced_types
from stage_train.state.export import digest
from stage_train.state.identity import shared_keys
from stage_train.state.lock import only_run_in
from stage_train.state.resume import Start
from stage_train.state.settle import settled
from stage_train.step.layouts import make_layout
from stage_train.step.loop import Loop

log = logging.getLogger(__name__)

# Exit status after Ctrl-C: what shells and make take for "stop here", as the sweep that a run may be part of does.


def train(cfgs: Sequence[TrainSchema]) -> None:
    """Train one SAE for each configuration, or continue where an earlier call with the same ones stopped."""
    world = init_world(cfgs[0].device.name, cfgs[0].device.threads)
    cfgs = [settled(cfg, world) for cfg in cfgs]
    with telling_lost_contact(), telling_disk_errors(), ExitStack() as stack:
        for folder in sorted({cfg.out_dir for cfg in cfgs}):
            stack.enter_context(only_run_in(Path(folder), world))
        Job(cfgs, world).execute()
    shutdown()


class Job:
    """Runs on one stream."""

    def __init__(self, cfgs: Sequence[TrainSchema], world: World) -> None:
        """Looks for earlier parts of the runs, opens the stores and checks everything that can be wrong.

        Changes nothing on disk and waits for nobody. Raises GranaryError.
        """
        tell_replaced_types(cfgs, world.device)
        cfgs = [on_device(cfg, world.device) for cfg in cfgs]
        check_alike(cfgs)
        self.world, cfg = world, cfgs[0]
        self.alone = len(cfgs) == 1
        """Whether the job is a single run."""
        self.starts = [Start.find(one, world) for one in cfgs]
        self.layout = make_layout(cfg.parallel, world)
        stores = self._pin_stores(cfgs)
        sites = []
        for one in cfgs:
            with self.blaming(one.out_dir):
                check_kernels(one.compute.kernels, world)
                sites.append(resolve_sites(one, stores))
        self.tokens = PinnedTokens.choose(cfg, stores, sites, world)
        self.specs: list[RunSpec] = []
        for one, start in zip(cfgs, self.starts, strict=True):
            with self.blaming(one.out_dir):
                spec = RunSpec.resolve(one, stores, self.tokens.data)
                self.layout.check(spec.dictionary, one)
                self.specs.append(spec)
            start.check_values(spec.learning.auxk_slope, spec.schedules.rate, spec.dictionary.decoder_rows)
        if self.tokens.blocks is not None:
            self.tokens.blocks.check(self._reader[0], self._stream)

    def execute(self) -> None:
        """Train, save, export. Ends the process with 128 + a stop signal's number when all is saved.

        Raises GranaryError when a run has diverged; if there are others, after they are done.
        """
        self._announce()
        pairs = list(zip(self.specs, self.starts, strict=True))
        learning = [(spec, start) for spec, start in pairs if start.step < spec.length.steps]
        # As of now: a folder may hold an older export.
        unfinished = [pair for pair in pairs if pair in learning or not self._is_exported(pair[0])]
        inputs = self.open_inputs()
        # A store with a window may still hold blocks that a run which is trained has passed.
        failed = self._train(inputs, learning) if learning or inputs.blocks is not None else set()
        for spec, start in unfinished:
            if spec.folder not in failed:
                finish(spec, start.checkpoints, self.world)
        if failed:
            self._tell_failed(failed)
        if inputs.blocks is not None and self.world.is_main:
            inputs.blocks.finish()
        if self.world.is_main:
            self._tell_done()

    # ---- before the first step -------------------------------------------------------------------------------------

    def _pin_stores(self, cfgs: Sequence[TrainSchema]) -> list[PinnedStore]:
        """As they are, or as they were when the checkpoints' runs began."""
        urls, beside = urls_of(cfgs[0]), named_urls(cfgs[0].store.beside)
        begun = [(one, start) for one, start in zip(cfgs, self.starts, strict=True) if start.checkpoint is not None]
        if not begun:
            return pin(urls, self.world, beside)
        first, records = begun[0][0], begun[0][1].state["stores"]
        for one, start in begun:
            if [_digests(record) for record in start.state["stores"]] != [_digests(record) for record in records]:
                raise GranaryError(
                    f"{first.out_dir} and {one.out_dir} were begun on other shards of the store, so they can't read "
                    "one stream: continue them without packed=true"
                )
        return repin(urls, records, beside)

    def open_inputs(self) -> TrainingInputs:
        """Claim what the runs read, and wait until there is some of it."""
        names = [name for spec in self.specs for name in self.layout.sites(spec.sites).names]
        return TrainingInputs.open(
            self.specs[0].cfg, self.world, self.tokens, names, claim=self._reader, stream=self._stream
        )

    @property
    def _reader(self) -> tuple[str, str]:
        """As what the job reads a store with a window: an id, and the folder of its runs."""
        claim = self.specs[0].id
        if not self.alone:
            claim = digest({spec.id: spec.cfg.out_dir for spec in self.specs})[:16]
        return claim, str(self._folder.resolve())

    @property
    def _stream(self) -> Mapping[str, Any] | None:
        """The state that the stream goes on from."""
        state: Mapping[str, Any] | None = furthest_back(self.starts).state.get("stream")
        return state

    @contextmanager
    def blaming(self, folder: str | Path) -> Iterator[None]:
        """Say which run an error belongs to where there are several."""
        try:
            yield
        except GranaryError as error:
            if self.alone:
                raise
            raise GranaryError(f"{self._prefix(folder)}{error}") from error

    def _prefix(self, folder: str | Path) -> str:
        return "" if self.alone else f"{Path(folder).name}: "

    def _announce(self) -> None:
        """Say what will be done and written, and refuse when the disk has no room for it."""
        if not self.world.is_main:
            return
        data, first = self.tokens.data, self.specs[0]
        for spec in self.specs:
            spec.folder.mkdir(parents=True, exist_ok=True)
        widths = {
            name: width
            for spec in self.specs
            for names, sizes in ((spec.sites.reads, spec.widths.reads), (spec.sites.writes, spec.widths.writes))
            for name, width in zip(names, sizes, strict=True)
        }
        log.info(
            "data: %s trainable tokens of %s in %s contexts of %d",
            f"{data.num_tokens:,}",
            ", ".join(f"{name} (d_model {width})" for name, width in widths.items()),
            f"{data.num_contexts:,}",
            data.seq_len,
        )
        for spec in self.specs:
            log.info("SAE: %s%s", self._prefix(spec.folder), spec.describe())
        longest = max((spec.length for spec in self.specs), key=lambda length: length.steps)
        log.info(
            "run: %s steps of %s tokens, %s in all (%.2f epochs) on %d x %s%s",
            f"{longest.steps:,}",
            f"{order_of(first.cfg).batch_size:,}",
            f"{longest.tokens:,}",
            longest.tokens / data.num_tokens,
            self.world.size,
            self.world.device.type,
            "" if self.alone else f", read once for {len(self.specs)} SAEs",
        )
        on_disk, free = sum(spec.most_on_disk for spec in self.specs), shutil.disk_usage(first.folder).free
        log.info(
            "disk: up to %.1f MiB of checkpoints and weights in %s (%.1f GiB free)",
            on_disk / 2**20,
            self._folder,
            free / GIB,
        )
        if on_disk > free:
            raise GranaryError(
                f"{self._folder} has {free / GIB:.1f} GiB free, checkpoints need up to {on_disk / GIB:.1f} GiB: "
                "lower checkpoint.keep or choose another out_dir"
            )
        for spec in self.specs:
            write_config(spec)

    @property
    def _folder(self) -> Path:
        """Where all is written."""
        folder = self.specs[0].folder
        return folder if self.alone else folder.parent

    # ---- training --------------------------------------------------------------------------------------------------

    def _train(self, inputs: TrainingInputs, learning: Sequence[tuple[RunSpec, Start]]) -> set[Path]:
        """Make all steps that are left; returns the folders of runs that diverged. Ends the process after a signal."""
        end = max(spec.length.end for spec in self.specs)
        with ExitStack() as stack:
            stream = stack.enter_context(
                closing(inputs.open_stream(self.layout.stream_rank, self.layout.stream_world, end))
            )
            runs = []
            for spec, start in learning:
                with self.blaming(spec.folder):
                    runs.append(Run(spec, start, inputs, stream, self.layout))
                if start.checkpoint is not None:
                    log.info(
                        "%scontinuing from step %d of %d", self._prefix(spec.folder), start.step, spec.length.steps
                    )
            inputs.forget_samples()
            state = furthest_back([start for _, start in learning] or self.starts).state.get("stream")
            bar = stack.enter_context(closing(self._progress_bar(runs)))
            stop = stack.enter_context(StopRequest())
            loop = Loop(runs, stream, inputs.blocks, stop, bar, self.world, alone=self.alone)
            if state is not None:
                stream.load_state_dict(state)
                loop.release()
            stopped = loop.run()
        if stopped is not None:
            self._tell_stopped(stopped, runs)
            sys.exit(stop.status)
        return {run.spec.folder for run in runs if run in loop.failed}

    def _is_exported(self, spec: RunSpec) -> bool:
        """Whether the dictionary of a run is in its folder, and intact; on all ranks the same."""
        intact: bool = broadcast_object(is_intact(spec.folder) if self.world.is_main else False)
        return intact

    def _progress_bar(self, runs: Sequence[Run]) -> ProgressBar:
        """Over the longest run, from where the first batch is."""
        longest = max((run.spec for run in runs), key=lambda spec: spec.length.steps, default=self.specs[0])
        done = min((run.trainer.progress for run in runs), key=lambda progress: progress.step, default=None)
        shown = bool(runs) and longest.cfg.logger.progress and self.world.is_main
        return ProgressBar(longest.length.tokens, 0 if done is None else done.tokens, enabled=shown)

    # ---- after the last --------------------------------------------------------------------------------------------

    def _tell_stopped(self, name: str, runs: Sequence[Run]) -> None:
        where = self.starts[0].checkpoints.folder if self.alone else f"{self._folder}/*/checkpoints"
        log.info(
            "stopped by %s after step %d of %d; all is saved in %s: the same command continues",
            "Ctrl-C" if name == "SIGINT" else name,
            max(run.step for run in runs),
            max(spec.length.steps for spec in self.specs),
            where,
        )

    def _tell_failed(self, failed: set[Path]) -> None:
        names = ", ".join(sorted(path.name for path in failed))
        raise GranaryError(
            f"{len(failed)} of {len(self.specs)} SAEs diverged ({names}), see above: lower optim.lr or "
            "optim.clip_norm for them; the others are done"
        )

    def _tell_done(self) -> None:
        what = f"the SAE is in {self._folder}; score it"
        if not self.alone:
            what = f"{len(self.specs)} SAEs are in {self._folder}; compare them"
        if is_in_memory():
            what = f"the SAE is in {self._folder}, its activations are gone; harvest other text, and score it"
        saes = self._folder if self.alone else self._folder / "*"
        log.info("%s with: %s", what, eval_command(self.specs[0].cfg, saes))


def furthest_back(starts: Sequence[Start]) -> Start:
    """That of the run whose next batch comes first."""
    return min(starts, key=lambda start: start.step)


def check_kernels(kernels: str, world: World) -> None:
    """Raise GranaryError for kernels that can't run on the device, or are not known."""
    try:
        resolve(kernels, torch.empty(0, device=world.device))
    except ValueError as error:
        raise GranaryError(f"compute.{error}") from None


def check_alike(cfgs: Sequence[TrainSchema]) -> None:
    """Raise GranaryError naming what differs of that which runs on one stream share."""
    seeds = sorted({order_of(cfg).seed for cfg in cfgs})
    if len(seeds) > 1:
        raise GranaryError(
            f"packed runs read one stream in one order, and the seeds {seeds} ask for several: give stream.seed=0, and "
            "they differ in their weights alone"
        )
    first = shared_keys(as_dict(cfgs[0])) if len(cfgs) > 1 else {}
    for cfg in cfgs[1:]:
        for key, value in shared_keys(as_dict(cfg)).items():
            if value != first.get(key):
                raise GranaryError(
                    f"packed runs read one stream in one process group, but {key} is {first.get(key)} for one and "
                    f"{value} for another: give one value"
                )
    folders = [cfg.out_dir for cfg in cfgs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise GranaryError(f"two of the packed runs have out_dir={folder}: give each its own")


def _digests(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["plan"], record["digest"], record["weight"]
