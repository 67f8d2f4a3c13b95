"""Waiting for what another process does, and saying so now and then."""

import time
from collections.abc import Callable

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds between looks
REPORT_EVERY = 60.0  # seconds


def wait_until(
    ready: Callable[[], bool], report: Callable[[], None], *, give_up: Callable[[], None] = lambda: None
) -> float:
    """Poll `ready` with growing pauses; returns the seconds waited.

    Before each pause `give_up` is called, which may raise; and `report` at once, then every minute.
    """
    start = time.monotonic()
    pause, reported = FIRST_PAUSE, 0.0
    while not ready():
        give_up()
        if time.monotonic() - start >= reported:
            reported += REPORT_EVERY
            report()
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    return time.monotonic() - start
