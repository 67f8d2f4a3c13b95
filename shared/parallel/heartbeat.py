"""Noticing that a machine is gone.

torchrun sees a rank of its own machine die, but not the death of another machine, and replicas of a harvest exchange
nothing that would fail. So every rank counts up a number of its own in the job's key-value store; rank 0 watches all of
them, the others watch rank 0.
"""

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from shared.parallel import World

BEAT_SECONDS = 3.0
SILENCE_SECONDS = 30.0
FINISHED = 1 << 40


class Heartbeat:
    """A context manager around the work of a rank; nothing in a world of one.

    Where a rank falls silent, this process ends with a line and status 2.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="granary-heartbeat", daemon=True)
        self._store: Any = None
        if world.size > 1:
            # A client of its own: another one is blocked while it waits for a key.
            store: Any = PrefixStore("granary_heartbeat", distributed_c10d._get_default_store())
            self._store = store.clone()

    def _run(self) -> None:
        watched = range(1, self.world.size) if self.world.is_main else range(1)
        seen = dict.fromkeys(watched, (0, time.monotonic()))
        try:
            while not self._stop.wait(BEAT_SECONDS):
                self._store.add(str(self.world.rank), 1)
                for rank in watched:
                    count = self._store.add(str(rank), 0)
                    before, since = seen[rank]
                    if count != before:
                        seen[rank] = (count, time.monotonic())
                    elif count < FINISHED and time.monotonic() - since > SILENCE_SECONDS:
                        self._give_up(f"rank {rank} has not been heard of for {SILENCE_SECONDS:.0f} s")
        except RuntimeError:  # the store is on one of the machines
            if not self._stop.is_set():
                self._give_up("the machine of rank 0 can't be reached")

    def _give_up(self, what: str) -> None:
        line = f"\nerror: {what}: its machine may be gone; run the same command again to continue"
        print(line, file=sys.stderr, flush=True)  # noqa: T201
        os._exit(2)

    def __enter__(self) -> Self:
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        self._stop.set()
        self._thread.join()
        if error is None:
            self._store.add(str(self.world.rank), FINISHED)
