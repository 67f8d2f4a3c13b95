"""Stopping together: a signal on one rank becomes the same decision at the same step on all of them."""

import logging
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# What Slurm (--signal) and torchrun send before they kill, and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# Seconds in which a further SIGINT is the same Ctrl-C: a terminal sends it to each process, and starters pass it on.
ONE_PRESS = 1.0

# Steps between exchanges of the flag.
EXCHANGE_EVERY = 4


class StopRequest:
    """Within its context the signals only set a flag; ``agreed`` tells whether any rank has it set.

    A second Ctrl-C raises KeyboardInterrupt: who asks twice does not want to wait for the save.

    Ranks exchange the flag every few steps, through host memory and while the steps run, so that nobody waits.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None
        self._interrupted: float | None = None

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer on all ranks. Call once per step.

        In a world of one the answer is at hand; else it comes up to 2 * EXCHANGE_EVERY steps after the signal.
        """
        if self._group is None:
            return self.received is not None
        if step % EXCHANGE_EVERY:
            return False
        if self._exchange is not None:
            self._exchange.wait()
            if self._flag.item():
                return True
        self._flag = torch.tensor([int(self.received is not None)], dtype=torch.int32)
        self._exchange = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    @property
    def status(self) -> int:
        """The exit status once all is saved: 128 + the signal's number, or 0 where another rank received it, as its own
        status counts."""
        return 0 if self.received is None else 128 + signal.Signals[self.received]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted > ONE_PRESS:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
        self.received = signal.Signals(number).name
