"""Waiting for training where the store has a window: the harvest's half of the back-pressure."""

import logging

from shared.basics.waiting import wait_until
from shared.store import Store

log = logging.getLogger(__name__)


class WindowGate:
    """Whether there is room for a shard yet. Every process looks for itself; none depends on another's answer."""

    def __init__(self, store: Store) -> None:
        self.window = store.window
        self._open_end = 0
        self._ended = False

    def wait(self, shard: int) -> bool:
        """Wait until `shard` may be written; False where training has ended, so that nothing more is needed."""
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
