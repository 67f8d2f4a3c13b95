"""Waiting for training where the store has a window: the harvest's half of the back-pressure."""

import logging

from shared.store import Store, wait_until

log = logging.getLogger(__name__)

REPORT_EVERY = 60.0  # seconds


class WindowGate:
    """Whether there is room for a shard yet. Every process looks for itself; none depends on another's answer."""

    def __init__(self, store: Store) -> None:
        self.window = store.window
        self._open_end = 0
        self._ended = False
        self._reported = 0.0

    def wait(self, shard: int) -> bool:
        """Wait until `shard` may be written; False where training has ended, so that nothing more is needed."""
        if self.window is None or shard < self._open_end:
            return True
        self._reported = 0.0
        wait_until(lambda: self._look(shard), lambda seconds: self._report(shard, seconds))
        return not self._ended

    def _look(self, shard: int) -> bool:
        assert self.window is not None
        self._open_end = self.window.open_end()
        self._ended = shard >= self._open_end and self.window.finished
        return shard < self._open_end or self._ended

    def _report(self, shard: int, seconds: float) -> None:
        if seconds >= self._reported:
            self._reported += REPORT_EVERY
            log.info("the window is full: waiting for training before shard %d", shard)
