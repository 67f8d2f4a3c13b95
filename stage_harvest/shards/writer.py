"""Writing behind the forward: a shard goes to disk while the next one is computed."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from shared.store import Store
from shared.store.buffers import empty_to_write
from stage_harvest.progress import HarvestProgress

STAGING_SETS = 2
Fill = Callable[[range, dict[str, Tensor], Callable[[int], None]], "torch.cuda.Event | None"]
"""Fills staging tensors with the activations of some contexts, telling of each that is done; an event where copies may
still run."""


def write_behind(
    store: Store, shards: Iterable[int], fill: Fill, progress: HarvestProgress, *, dtype: torch.dtype, pin: bool
) -> None:
    """Make `shards` by `fill`, each written while the next is computed; `dtype` and `pin` as of BackgroundWriter."""
    with BackgroundWriter(store, dtype, pin=pin) as writer:
        for shard in shards:
            staging = writer.staging()
            advance = lambda done: progress.advance(done, writer.wait_seconds)  # noqa: E731
            writer.submit(shard, staging, fill(store.shard_contexts(shard), staging, advance))
        writer.drain()


class BackgroundWriter:
    """Two sets of staging tensors, one being filled and one being written. A context manager: leaving it waits."""

    def __init__(self, store: Store, dtype: torch.dtype, *, pin: bool) -> None:
        """`dtype` of the staging tensors: the stored one where the store takes it as it is; `pin` for a GPU."""
        shape = (store.plan.shard_contexts, store.plan.seq_len)
        self.store = store
        self.wait_seconds = 0.0
        self._free = [
            {hook: empty_to_write((*shape, d), dtype, pin=pin) for hook, d in store.plan.hooks.items()}
            for _ in range(min(STAGING_SETS, store.plan.num_shards))
        ]
        self._writing: deque[tuple[Future[None], dict[str, Tensor]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="granary-write")

    def staging(self) -> dict[str, Tensor]:
        """A set of tensors [shard_contexts, T, d_model] to fill; waits for the disk where both are in use.

        Raises what the writing of an earlier shard raised.
        """
        while self._writing and (not self._free or self._writing[0][0].done()):
            self._collect()
        return self._free.pop()

    def submit(self, shard: int, staging: dict[str, Tensor], filled: torch.cuda.Event | None) -> None:
        """Write `staging` as `shard` in the background, once `filled` has passed."""
        self._writing.append((self._thread.submit(self._write, shard, staging, filled), staging))

    def drain(self) -> None:
        """Wait until all is written; raises what the writing raised."""
        while self._writing:
            self._collect()

    def _collect(self) -> None:
        future, staging = self._writing.popleft()
        start = time.perf_counter()
        try:
            future.result()
        finally:
            self.wait_seconds += time.perf_counter() - start
            self._free.append(staging)

    def _write(self, shard: int, staging: Mapping[str, Tensor], filled: torch.cuda.Event | None) -> None:
        if filled is not None:
            filled.synchronize()
        num_contexts = len(self.store.shard_contexts(shard))
        self.store.write_shard(shard, {hook: tensor[:num_contexts] for hook, tensor in staging.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            # After an error a queued shard is dropped; the one being written ends on its own, whole or not at all.
            self._thread.shutdown(wait=True, cancel_futures=True)
