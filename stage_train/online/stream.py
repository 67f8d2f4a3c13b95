"""Batches from shuffle buffers that a model fills, under the protocol of the stream that reads a store.

Each place has a buffer of its own, so places may give any number of rows per forward: a row of one batch is not the
same token at all of them, as SAEs of one place each need not have. One that gives more rows than another learns from
as many; the rest of its rows is left out.
"""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shared.basics.errors import GranaryError
from shared.parallel import World
from stage_train.data.stream import AnyBatch, Batch
from stage_train.online.buffer import RowBuffer
from stage_train.online.rows import ModelRows

# Batches that a buffer holds where nothing else is asked for; half of it is handed out between two fillings.
BUFFERED_BATCHES = 64


class BufferedStream:
    """An iterator over batches of `batch_size` rows, all ranks together; each rank runs its own model on its own."""

    def __init__(self, source: ModelRows, world: World, *, batch_size: int, seed: int, buffer_rows: int) -> None:
        """Runs the model until every buffer, of `buffer_rows` rows on all ranks together, is full.

        Raises GranaryError where sizes do not fit, and where the model gives no rows.
        """
        if batch_size % world.size:
            raise GranaryError(
                f"stream.batch_size={batch_size} does not divide among {world.size} processes: choose a multiple"
            )
        if buffer_rows < 2 * batch_size:
            raise GranaryError(
                f"buffer_rows={buffer_rows:,} must hold two batches of stream.batch_size={batch_size:,} at least"
            )
        self.source, self.world, self.batch_size, self.seed = source, world, batch_size, seed
        self.share, self.capacity = batch_size // world.size, buffer_rows // world.size
        self.wait_seconds = 0.0
        """Time spent in the model's forwards since the stream was made."""
        self.skipped_tokens = 0
        self.skips_damaged = False
        self.buffers: dict[str, RowBuffer] = {}
        self._index = self._tokens = 0
        self._has_ended = False
        self._fill()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Count on from where `state` was taken; the rows are others than they would have been then."""
        self._index, self._tokens = int(state["batch"]), int(state["tokens"])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; the rows in the buffers are no part of it."""
        order = {"batch_size": self.batch_size, "seed": self.seed, "drawn": self.source.drawn}
        return {"epoch": self.source.passes, "batch": self._index, "order": order, "tokens": self._tokens}

    def ends_epoch(self, batch: AnyBatch) -> bool:
        """Passes over the user's batches run into one another: no batch ends one."""
        return False

    def epochs_passed(self) -> int:
        """Passes over the user's batches."""
        return self.source.passes

    def __next__(self) -> Batch:
        """The next batch. Raises GranaryError when the user's batches have ended and too few rows are left."""
        if min(map(len, self.buffers.values())) - self.share < self.capacity // 2:
            self._fill()
        rows = min(self.share, *map(len, self.buffers.values()))
        if not rows or (rows < self.share and self.world.size > 1):
            raise BatchesEndedError(self._tokens)
        activations = {name: buffer.take(rows) for name, buffer in self.buffers.items()}
        batch = Batch(activations, self.source.passes, self._index, rows * self.world.size, rows)
        self._index += 1
        self._tokens += batch.num_tokens
        return batch

    def _fill(self) -> None:
        """Run the model until all buffers are full or the batches have ended, then shuffle what is there."""
        begin = time.perf_counter()
        for buffer in self.buffers.values():
            buffer.add_leftover()
        while not self._has_ended and (not self.buffers or any(buffer.room for buffer in self.buffers.values())):
            rows = self.source.next()
            if rows is None:
                self._has_ended = True
                break
            for name, rows_ND in rows.items():
                self._buffer(name, rows_ND).add(rows_ND)
        if not self.buffers or not all(map(len, self.buffers.values())):
            raise BatchesEndedError(self._tokens)
        for buffer in self.buffers.values():
            buffer.shuffle()
        self.wait_seconds += time.perf_counter() - begin

    def _buffer(self, name: str, rows_ND: Tensor) -> RowBuffer:
        if name not in self.buffers:
            self.buffers[name] = RowBuffer(self.capacity, rows_ND, self.world.device, self.seed)
        return self.buffers[name]


class BatchesEndedError(GranaryError):
    """There are fewer rows than the training was to have."""

    def __init__(self, tokens: int) -> None:
        super().__init__(
            f"the batches ended after {tokens:,} rows: give more, fewer tokens=..., or a list or DataLoader, which is"
            " gone through again"
        )
