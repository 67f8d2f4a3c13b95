"""Waiting for training where the store has a window: the harvest's half of the back-pressure."""

import logging
from collections.abc import Iterable, Iterator

from shared.basics.waiting import wait_until
from shared.store import Store

log = logging.getLogger(__name__)


class WindowGate:
    """Whether there is room for a shard yet. Every process looks for itself; none depends on another's answer."""

    def __init__(self, store: Store, *, alone: bool) -> None:
        """`alone`: this process makes its shards by itself, and so may leave out those that training has passed."""
        self.store, self.window, self.alone = store, store.window, alone
        self._open_end = 0
        self._ended = False

    def let_through(self, shards: Iterable[int]) -> Iterator[int]:
        """Each of `shards` when it may be written, until training has ended and nothing more is needed."""
        for shard in shards:
            if not self._wait(shard):
                return
            passed = self.window is not None and self.window.is_passed(shard, self.store.heldout_shards)
            if not (passed and self.alone):
                yield shard

    def _wait(self, shard: int) -> bool:
        """Wait until `shard` may be written; False where training has ended."""
        if self.window is None or shard < self._open_end:
            return True
        wait_until(
            lambda: self._look(shard),
            lambda: log.info("the window is full: waiting for training before shard %d", shard),
        )
        return not self._ended

    def _look(self, shard: int) -> bool:
        assert self.window is not None
        self._open_end = self.window.open_end()
        self._ended = shard >= self._open_end and self.window.finished
        return shard < self._open_end or self._ended
