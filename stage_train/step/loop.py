"""The loop of training: fetch a batch, let every run learn from it, save, stop together, release what is passed.

The step itself is ``trainer.Trainer.step``. A batch has a number, and a run learns from it when that is the run's next
step: runs that were saved at different steps, or end at different steps, need nothing more.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from shared.parallel import World
from shared.parallel.stop import StopRequest
from stage_train.data.blocks import StoppedWaiting, WindowReader
from stage_train.data.stream import AnyBatch, BatchStream
from stage_train.show.progress import ProgressBar
from stage_train.step.trainer import DivergedError, Trainer

log = logging.getLogger(__name__)


class Learner(Protocol):
    """What the loop asks of a run."""

    trainer: Trainer

    @property
    def name(self) -> str:
        """The name of the run's folder."""

    @property
    def step(self) -> int:
        """Steps done."""

    @property
    def is_trained(self) -> bool:
        """Whether none is left."""

    def learn(self, batch: AnyBatch) -> Mapping[str, float | int] | None:
        """One step; the metrics where it is time to log."""

    def wants_save(self) -> bool:
        """Whether a checkpoint is due."""

    def save(self) -> None:
        """Begin to write one."""

    def wait_for_save(self) -> None:
        """Wait until the checkpoint is on disk."""

    def close(self) -> None:
        """End recording."""


class StepObserver(Protocol):
    """Sees every step of every run of this process."""

    def before_step(self, run: Learner, batch: AnyBatch) -> None:
        """Called when `run` is about to learn from `batch`."""

    def after_step(self, run: Learner, batch: AnyBatch) -> None:
        """Called when it has."""


observers: list[StepObserver] = []
"""Told of the steps of all loops of this process, in this order."""


class Loop:
    """Runs that learn from one stream until they are trained, or a signal comes."""

    def __init__(
        self,
        runs: Sequence[Learner],
        stream: BatchStream,
        blocks: WindowReader | None,
        stop: StopRequest,
        bar: ProgressBar,
        world: World,
        *,
        alone: bool,
    ) -> None:
        """`blocks` is the reader of a store with a window, else None; `alone`: no other run depends on this loop."""
        self.runs, self.learning = list(runs), list(runs)
        self.stream, self.blocks, self.stop, self.bar = stream, blocks, stop, bar
        self.world, self.alone = world, alone
        self.number = min((run.step for run in runs), default=0)
        """Of the next batch, as the runs count their steps."""
        self.failed: list[Learner] = []
        """Runs that have diverged."""
        self._latest: dict[Learner, Mapping[str, float | int]] = {}
        if blocks is not None:
            blocks.stop_requested = lambda: stop.received is not None

    def run(self) -> str | None:
        """Make all steps that are left; returns the name of the signal when one ended them early."""
        with ExitStack() as stack:
            for run in self.runs:
                stack.callback(run.close)
            while self.learning:
                try:
                    batch = next(self.stream)
                except StoppedWaiting:  # nothing has happened since the end of the last block
                    self.wait_for_saves()
                    return self.stop.received
                turn = self.learn(batch)
                halt = self.stop.agreed(self.number)
                passed = self.blocks is not None and self.stream.ends_epoch(batch)
                self.save(turn, all_of_them=halt or passed)
                if passed:
                    self.release()
                self.learning = [run for run in self.learning if not run.is_trained and run not in self.failed]
                if halt and self.learning:
                    self.wait_for_saves()
                    return self.stop.received or "a signal to another process"
        return None

    def learn(self, batch: AnyBatch) -> list[Learner]:
        """Let the runs learn whose next step this is; returns them, those that have diverged left out."""
        turn = [run for run in self.learning if run.step == self.number]
        for run in turn:
            with self.leaving_on_divergence(run):
                for observer in observers:
                    observer.before_step(run, batch)
                if metrics := run.learn(batch):
                    self._latest[run] = metrics
                for observer in observers:
                    observer.after_step(run, batch)
        self.number += 1
        self.bar.advance(batch.num_tokens)
        if self._latest:
            self.bar.show(list(self._latest.values()))
        return [run for run in turn if run not in self.failed]

    def save(self, turn: Sequence[Learner], *, all_of_them: bool) -> None:
        """Begin to write the checkpoints that are due."""
        for run in turn:
            if all_of_them or run.wants_save():
                with self.leaving_on_divergence(run):
                    run.save()

    def wait_for_saves(self) -> None:
        """Wait until what is pending anywhere, also of runs that have ended, is on disk."""
        for run in self.runs:
            run.wait_for_save()

    def release(self) -> None:
        """Delete the blocks of a windowed store that the stream has passed, when all checkpoints are on disk."""
        self.wait_for_saves()
        if self.blocks is not None and self.world.is_main:
            self.blocks.release(self.stream.epochs_passed())

    @contextmanager
    def leaving_on_divergence(self, run: Learner) -> Iterator[None]:
        """A run that diverges, which all ranks see alike, leaves the loop; alone it ends it."""
        try:
            yield
        except DivergedError as error:
            if self.alone:
                raise
            self.failed.append(run)
            log.warning("%s: %s", run.name, error)
