"""Reading a store that is larger than its disk: training's half of the back-pressure.

The harvest runs at the same time, at most a window ahead (shared.store.window). What the stream calls an epoch is then
a block of the store: it is shuffled in itself, and training enters it when all of it is there. A block is deleted only
when a checkpoint that needs it no more is on disk, so training may be killed anywhere.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.basics.errors import GranaryError
from shared.basics.waiting import wait_until
from shared.store import Store, Window
from stage_train.data.stores import PinnedStore

log = logging.getLogger(__name__)


class StoppedWaiting(Exception):  # noqa: N818 - no error: the user asked for it
    """A stop signal came while training waited for the harvest."""


class WindowReader:
    """The one reader of a windowed store. Every process may ask and wait; the main one alone claims and deletes."""

    def __init__(self, store: Store, window: Window) -> None:
        self.store, self.window = store, window
        self.stop_requested: Callable[[], bool] = lambda: False
        """Looked at while waiting."""
        self._ready = -1  # blocks up to this one are known to be there

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """First context of every block, then the end of the last: int64 [blocks + 1]."""
        ends = self.window.plan.ends
        starts = [0, *(self.store.shard_contexts(end).start for end in ends[:-1])]
        return np.array([*starts, self.store.num_contexts], np.int64)

    def begin(self, run: str, folder: str, stream: Mapping[str, Any] | None) -> None:
        """Claim the store for this run; `stream` is the state that it continues from. Raises as `check`."""
        self.window.claim(run, folder)
        self.check(run, stream)

    def check(self, run: str, stream: Mapping[str, Any] | None) -> None:
        """Raise GranaryError where another run reads the store, or what this one needs is deleted already."""
        self.window.check_reader(run)
        passed, first = self.window.passed(), 0 if stream is None else int(stream["epoch"])
        if passed > first + 1 or (stream is None and passed):
            raise GranaryError(
                f"{self.store.url} has store.window, and training has passed (and deleted) its first {passed} blocks: "
                f"this run would begin with block {first}; continue the run that read them, or harvest anew"
            )

    def release(self, blocks: int) -> None:
        """Delete the first `blocks` blocks, which a checkpoint on disk has passed; what is deleted already stays so."""
        for block in range(blocks):
            self.store.release(block)

    def finish(self) -> None:
        """Tell the harvest that no more is read."""
        self.window.finish()

    def ready(self, block: int) -> bool:
        """Whether all training shards of a block are committed."""
        if block > self._ready:
            committed = self.store.committed()
            needed = set(self.window.plan.shards(block)) - self.store.heldout_shards
            if not needed <= committed.keys():
                return False
            self._ready = block
        return True

    def wait(self, block: int) -> None:
        """Wait until all of `block` is there. Raises StoppedWaiting."""

        def report() -> None:
            log.info("waiting for the harvest: block %d of %d is not there yet", block, self.window.plan.num_blocks)

        def give_up() -> None:
            if self.stop_requested():
                raise StoppedWaiting

        wait_until(lambda: self.ready(block), report, give_up=give_up)


def windowed(stores: Sequence[PinnedStore], max_norm_multiple: float | None) -> WindowReader | None:
    """A reader where the store has a window, else None. Raises GranaryError for what a window does not allow."""
    found = [part for part in stores if part.store.window is not None]
    if not found:
        return None
    if len(stores) > 1 or stores[0].weight != 1:
        raise GranaryError(f"{found[0].store.url} has store.window: it is read alone, once, with weight 1")
    if max_norm_multiple is not None:
        raise GranaryError(
            "stream.max_norm_multiple needs the whole store before the first step, and store.window has only a part of "
            "it: set it to null"
        )
    store = found[0].store
    assert store.window is not None
    return WindowReader(store, store.window)
