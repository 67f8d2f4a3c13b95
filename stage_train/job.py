"""The work of one process group: one run, or many that learn from the same pass over the store.

All runs of a job read one stream, so what they share (stores, order of tokens, processes) is asked for alike by all.
A batch has a number, and a run learns from it when that is the run's next step: runs that were saved at different
steps, or end at different steps, need nothing more.
"""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.parallel import World, init_world, shutdown, telling_lost_contact
from shared.parallel.stop import StopRequest
from stage_train.config import TrainSchema, as_dict
from stage_train.data.blocks import StoppedWaiting
from stage_train.data.inputs import Feed, order_of
from stage_train.data.stores import FrozenStore, freeze, refreeze
from stage_train.data.stream import TokenStream
from stage_train.run import Run
from stage_train.show.progress import ProgressBar
from stage_train.state.export import digest
from stage_train.state.identity import flatten
from stage_train.state.lock import only_run_in
from stage_train.step.trainer import DivergedError

log = logging.getLogger(__name__)

# Keys that all runs of a job give alike.
SHARED = ("nproc", "store.", "stream.", "parallel.", "device.")


def train(cfgs: Sequence[TrainSchema]) -> None:
    """Train one SAE for each configuration, or continue where an earlier call with the same ones stopped."""
    world = init_world(cfgs[0].device.name, cfgs[0].device.threads)
    with telling_lost_contact(), ExitStack() as stack:
        for folder in sorted({cfg.out_dir for cfg in cfgs}):
            stack.enter_context(only_run_in(Path(folder), world))
        Job(cfgs, world).execute()
    shutdown()


class Job:
    """Runs on one stream."""

    def __init__(self, cfgs: Sequence[TrainSchema], world: World) -> None:
        """Opens the stores and checks everything that can be wrong before any work. Raises GranaryError."""
        check_alike(cfgs)
        self.world, cfg = world, cfgs[0]
        self.runs = [Run(cfg, world) for cfg in cfgs]
        stores = self._open_stores(cfg)
        for run in self.runs:
            self._named(run, run.choose, stores)
        first = furthest_back(self.runs)
        claim = self.runs[0].id if self.alone else digest({run.id: run.cfg.out_dir for run in self.runs})[:16]
        folder = self.runs[0].folder if self.alone else self.runs[0].folder.parent
        self.feed = Feed(
            cfg,
            world,
            stores,
            [run.hook for run in self.runs],
            claim=(claim, str(folder.resolve())),
            stream=first.state.get("stream"),
        )
        for run in self.runs:
            self._named(run, run.join, self.feed)
        self.failed: set[Run] = set()
        """Runs that have diverged."""

    @property
    def alone(self) -> bool:
        """Whether the job is a single run."""
        return len(self.runs) == 1

    def execute(self) -> None:
        """Train, save, export. Ends the process with status 0 after a stop signal, when all is saved.

        Raises GranaryError when a run has diverged; if there are others, after they are done.
        """
        self._announce()
        learning = [run for run in self.runs if not run.is_trained]
        unfinished = [run for run in self.runs if not run.is_complete]  # as of now: a folder may hold an older export
        with ExitStack() as stack:
            end = max(run.length.end for run in self.runs)
            stream = stack.enter_context(closing(self.feed.open_stream(self.runs[0].layout, end)))
            for run in learning:
                self._named(run, run.start, stream)
                if run.checkpoint is not None:
                    log.info("%scontinuing from step %d of %d", self._prefix(run), run.step, run.length.steps)
            self.feed.forget_samples()
            state = furthest_back(learning or self.runs).state.get("stream")
            if state is not None:
                stream.load_state_dict(state)
                self._release(stream)
            stopped = self._train(learning, stream, stack.enter_context(StopRequest())) if learning else None
        if stopped is not None:
            self._tell_stopped(stopped)
            sys.exit(0)
        for run in unfinished:
            if run not in self.failed:
                run.finish()
        if self.failed:
            self._tell_failed()
        if self.feed.window is not None and self.world.is_main:
            self.feed.window.window.finish()
        if self.world.is_main:
            self._tell_done()

    # ---- before the first step -------------------------------------------------------------------------------------

    def _open_stores(self, cfg: TrainSchema) -> list[FrozenStore]:
        """As frozen now, or as they were when the checkpoints' runs began."""
        urls = [(cfg.store.url, cfg.store.weight), *((other.url, other.weight) for other in cfg.store.others)]
        begun = [run for run in self.runs if run.checkpoint is not None]
        if not begun:
            return freeze(urls, self.world)
        records = begun[0].state["stores"]
        for run in begun:
            if [_digests(record) for record in run.state["stores"]] != [_digests(record) for record in records]:
                raise GranaryError(
                    f"{begun[0].folder} and {run.folder} were begun on other shards of the store, so they can't read "
                    "one stream: continue them without packed=true"
                )
        return refreeze(urls, records)

    def _named(self, run: Run, call: Any, *arguments: Any) -> None:
        """Call, and say which run an error belongs to where there are several."""
        try:
            call(*arguments)
        except GranaryError as error:
            if self.alone:
                raise
            raise GranaryError(f"{self._prefix(run)}{error}") from error

    def _prefix(self, run: Run) -> str:
        return "" if self.alone else f"{run.folder.name}: "

    def _announce(self) -> None:
        """Say what will be done and written, and refuse when the disk has no room for it."""
        if not self.world.is_main:
            return
        data, first = self.feed.data, self.runs[0]
        for run in self.runs:
            run.folder.mkdir(parents=True, exist_ok=True)
        log.info(
            "data: %s trainable tokens of %s in %s contexts of %d",
            f"{data.num_tokens:,}",
            ", ".join(f"{hook} (d_model {width})" for hook, (width, _) in self.feed.hooks.items()),
            f"{data.num_contexts:,}",
            data.seq_len,
        )
        for run in self.runs:
            log.info("SAE: %s%s", self._prefix(run), run.describe())
        longest = max((run.length for run in self.runs), key=lambda length: length.steps)
        log.info(
            "run: %s steps of %s tokens, %s in all (%.2f epochs) on %d x %s%s",
            f"{longest.steps:,}",
            f"{self.feed.order.batch_size:,}",
            f"{longest.tokens:,}",
            longest.tokens / data.num_tokens,
            self.world.size,
            self.world.device.type,
            "" if self.alone else f", read once for {len(self.runs)} SAEs",
        )
        folder = first.folder if self.alone else first.folder.parent
        on_disk, free = sum(run.most_on_disk for run in self.runs), shutil.disk_usage(first.folder).free
        log.info(
            "disk: up to %.1f MiB of checkpoints and weights in %s (%.1f GiB free)", on_disk / 2**20, folder, free / GIB
        )
        if on_disk > free:
            raise GranaryError(
                f"{folder} has {free / GIB:.1f} GiB free, checkpoints need up to {on_disk / GIB:.1f} GiB: "
                "lower checkpoint.keep or choose another out_dir"
            )
        for run in self.runs:
            run.write_config()

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _train(self, learning: list[Run], stream: TokenStream, stop: StopRequest) -> str | None:
        """All steps that are left; the name of the signal when one ended them early."""
        with ExitStack() as stack:
            for run in learning:
                stack.callback(run.close)
                run.open_loggers()
            longest = max(learning, key=lambda run: run.length.steps)
            done = furthest_back(learning).trainer.progress.tokens
            enabled = longest.cfg.logger.progress and self.world.is_main
            bar = stack.enter_context(closing(ProgressBar(longest.length.tokens, done, enabled=enabled)))
            if self.feed.window is not None:
                self.feed.window.stop_requested = lambda: stop.received is not None
            number = furthest_back(learning).step
            latest: dict[Run, Mapping[str, float | int]] = {}
            while learning:
                try:
                    batch = next(stream)
                except StoppedWaiting:
                    self._wait_for_saves()  # of the end of the last block: nothing has happened since
                    return stop.received
                turn = [run for run in learning if run.step == number]
                for run in turn:
                    if metrics := self._guarded(run, run.learn, batch):
                        latest[run] = metrics
                number += 1
                bar.advance(batch.num_tokens)
                if latest:
                    bar.show(list(latest.values()))
                halt = stop.agreed(number)
                passed = self.feed.window is not None and batch.index + 1 == stream.plan(batch.epoch).num_batches
                for run in turn:
                    if run not in self.failed and (halt or passed or run.wants_save()):
                        self._guarded(run, run.save)
                if passed:
                    self._wait_for_saves()
                    self._release(stream)
                learning = [run for run in learning if not run.is_trained and run not in self.failed]
                if halt and learning:
                    self._wait_for_saves()
                    return stop.received or "a signal to another process"
            return None

    def _guarded(self, run: Run, call: Any, *arguments: Any) -> Any:
        """Call; a run that has diverged, which all ranks see alike, leaves the job, and ends it if it is alone."""
        try:
            return call(*arguments)
        except DivergedError as error:
            if self.alone:
                raise
            self.failed.add(run)
            log.warning("%s%s", self._prefix(run), error)
            return None

    def _wait_for_saves(self) -> None:
        """Also of runs that have ended: what is pending anywhere is on disk then."""
        for run in self.runs:
            run.checkpoints.wait()

    def _release(self, stream: TokenStream) -> None:
        """Delete the blocks of a windowed store that the checkpoints on disk (they are where it is) have passed."""
        if self.feed.window is not None and self.world.is_main:
            state = stream.state_dict()
            ended = state["batch"] >= stream.plan(state["epoch"]).num_batches
            self.feed.window.release(state["epoch"] + ended)

    # ---- after the last --------------------------------------------------------------------------------------------

    def _tell_stopped(self, signal: str) -> None:
        run = self.runs[0]
        where = run.checkpoints.folder if self.alone else f"{run.folder.parent}/*/checkpoints"
        step = max(run.step for run in self.runs)
        total = max(run.length.steps for run in self.runs)
        log.info(
            "stopped by %s after step %d of %d; all is saved in %s: the same command continues",
            signal,
            step,
            total,
            where,
        )

    def _tell_failed(self) -> None:
        names = ", ".join(run.folder.name for run in self.failed)
        raise GranaryError(
            f"{len(self.failed)} of {len(self.runs)} SAEs diverged ({names}), see above: lower optim.lr or "
            "optim.clip_norm for them; the others are done"
        )

    def _tell_done(self) -> None:
        run = self.runs[0]
        what = f"the SAE is in {run.folder}; score it"
        if not self.alone:
            what = f"{len(self.runs)} SAEs are in {run.folder.parent}; compare them"
        log.info(
            "%s with: python -m stage_eval %s",
            what,
            run.eval_arguments(run.folder if self.alone else run.folder.parent / "*"),
        )


def furthest_back(runs: Sequence[Run]) -> Run:
    """The run whose next batch comes first."""
    return min(runs, key=lambda run: run.step)


def check_alike(cfgs: Sequence[TrainSchema]) -> None:
    """Raise GranaryError naming what differs of that which runs on one stream share."""
    seeds = sorted({order_of(cfg).seed for cfg in cfgs})
    if len(seeds) > 1:
        raise GranaryError(
            f"packed runs read one stream in one order, and the seeds {seeds} ask for several: give stream.seed=0, and "
            "they differ in their weights alone"
        )
    first = shared_keys(cfgs[0])
    for cfg in cfgs[1:]:
        for key, value in shared_keys(cfg).items():
            if value != first.get(key):
                raise GranaryError(
                    f"packed runs read one stream in one process group, but {key} is {first.get(key)} for one and "
                    f"{value} for another: give one value"
                )
    folders = [cfg.out_dir for cfg in cfgs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise GranaryError(f"two of the packed runs have out_dir={folder}: give each its own")


def shared_keys(cfg: TrainSchema) -> dict[str, Any]:
    """What describes the stream and the processes: ``{"stream.lanes": 64, ...}``."""
    return {key: value for key, value in flatten(as_dict(cfg)) if key.startswith(SHARED)}


def _digests(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["plan"], record["digest"], record["weight"]
