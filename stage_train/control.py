"""Stopping together: a signal on one rank becomes the same decision at the same step on all of them."""

import logging
import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# What Slurm (--signal) and torchrun send before they kill.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within its context the signals only set a flag; ``agreed`` tells, once per step, whether any rank has it set.

    Ranks exchange the flag through host memory while the step runs, so that nobody waits for the device.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def post(self) -> None:
        """Offer this rank's flag; call at the beginning of a step."""
        self._flag[0] = int(self.received is not None)
        if self._group is not None:
            self._exchange = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank's flag was set when it was posted; call at the end of the same step.

        In a world of one, whether it is set now.
        """
        if self._group is None:
            return self.received is not None
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None
        return bool(self._flag[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
