"""What streams over a store share: where they stand, how they end and resume, and the way from slots to batches.

The state is (epoch, batch index) and nothing else. What fixes the order is the plan of an epoch, a pure function of
(data, order, epoch); a subclass says what a batch takes of it, and in which order contexts are needed for that.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.store import DamagedObjectError
from stage_train.data.stream.batch import AnyBatch
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.epoch import Order, Plan, too_few_tokens
from stage_train.data.stream.pool import ContextPool

log = logging.getLogger(__name__)

OrderT = TypeVar("OrderT", bound=Order)
PlanT = TypeVar("PlanT", bound=Plan)
BatchT = TypeVar("BatchT", bound=AnyBatch)


class StoreStream(Generic[OrderT, PlanT, BatchT]):
    """An endless (or bounded) iterator over batches, with exact resume at any number of processes."""

    def __init__(
        self,
        data: TrainingData,
        sites: Mapping[str, tuple[int, torch.dtype]],
        order: OrderT,
        slots: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        io_threads: int,
        pool_device: torch.device | str | None,
        skip_damaged: bool,
    ) -> None:
        """`sites` maps each site to (width, dtype the store reads); `slots` contexts are in memory at a time.

        `skip_damaged` leaves out the tokens of contexts that raise DamagedObjectError, instead of raising it. Every
        other token stays in its batch, so order and state are those of the undamaged store.
        """
        self.data, self.order = data, order
        self._plans: dict[int, PlanT] = {}
        self._device = torch.device(device)
        self._pool = ContextPool(
            data, sites, slots=slots, io_threads=io_threads, device=torch.device(pool_device or "cpu")
        )
        self._dtype = dtype
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self.wait_seconds = 0.0
        """Time spent waiting for reads since the stream was made."""
        self.skipped_tokens = 0
        """Tokens that this rank has left out of the batches handed out since the stream was made."""
        self.skips_damaged = skip_damaged
        self._reported: set[str] = set()
        self._stop: tuple[int, int] | None = None
        self._epoch = self._batch = 0
        self._is_reading = False
        self._scheduled = 0  # the last epoch that the schedule has come to

    # What a subclass says

    @abstractmethod
    def make_plan(self, epoch: int) -> PlanT:
        """The order of an epoch."""

    @abstractmethod
    def _begin(self, plan: PlanT, batch: int) -> None:
        """Start to read what is needed from a batch on, of which nothing is read yet."""

    @abstractmethod
    def _enter(self, plan: PlanT, *, anew: bool) -> None:
        """Go over into the next epoch, while reading; `anew`: of which nothing is scheduled yet."""

    @abstractmethod
    def _take(self, plan: PlanT) -> BatchT:
        """The batch where the stream stands."""

    @abstractmethod
    def _held(self) -> Iterator[tuple[list[int], "Sequence[Future[None]]"]]:
        """Take out all that was read ahead: slots, and what fills them."""

    # What is the same

    @property
    def buffer_bytes(self) -> int:
        """Memory for contexts on this rank: in use and read ahead."""
        return self._pool.num_bytes

    def stop_at(self, epoch: int, batch: int) -> None:
        """Hand out no batch from (epoch, batch) on, and read nothing that only later batches need."""
        self._stop = (epoch, batch)
        self._rewind()

    def plan(self, epoch: int) -> PlanT:
        """The order of an epoch."""
        if epoch not in self._plans:
            for old in [e for e in self._plans if e < self._epoch]:
                del self._plans[old]
            self._plans[epoch] = self.make_plan(epoch)
        return self._plans[epoch]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; the same on every rank."""
        return {"epoch": self._epoch, "batch": self._batch, "order": asdict(self.order), "tokens": self.data.num_tokens}

    def ends_epoch(self, batch: AnyBatch) -> bool:
        """Whether `batch`, the last that was handed out, is its epoch's last."""
        return batch.index + 1 == self.plan(batch.epoch).num_batches

    def epochs_passed(self) -> int:
        """Epochs of which every batch has been handed out."""
        return self._epoch + (self._batch >= self.plan(self._epoch).num_batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises GranaryError when the order or the data are not the same."""
        mine = self.state_dict()
        for key in ("order", "tokens"):
            if state[key] != mine[key]:
                raise GranaryError(f"the saved stream had {key} {state[key]}, this one has {mine[key]}")
        self._epoch, self._batch = int(state["epoch"]), int(state["batch"])
        self._rewind()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchT:
        """The next batch. Raises GranaryError naming the shard when a read fails."""
        if self._batch >= self.plan(self._epoch).num_batches:
            self._next_epoch()
        if (self._stop is not None and (self._epoch, self._batch) >= self._stop) or self._epoch == self.data.num_blocks:
            raise StopIteration
        plan = self.plan(self._epoch)
        if not self._is_reading:
            self._wait_for_block()
            self._begin(plan, self._batch)
            self._is_reading = True
        batch = self._take(plan)
        self._batch += 1
        return batch

    def _wait_for_block(self) -> None:
        """Until the harvest has made what comes next."""
        if self.data.blocks is not None:
            begin = time.perf_counter()
            self.data.blocks.wait(self._epoch)
            self.wait_seconds += time.perf_counter() - begin

    def _next_epoch(self) -> None:
        if not self.plan(self._epoch).num_batches:
            raise too_few_tokens(self.plan(self._epoch))
        self._epoch, self._batch = self._epoch + 1, 0
        if not self._is_reading:
            return
        if self._epoch == self.data.num_blocks or (self._stop is not None and (self._epoch, 0) >= self._stop):
            return
        is_new = self._scheduled < self._epoch  # reading ahead ended where the harvest was
        if is_new:
            self._wait_for_block()
        self._enter(self.plan(self._epoch), anew=is_new)

    def _rewind(self) -> None:
        """Forget what was read ahead; the next batch starts reading anew at the current position."""
        for slots, reads in self._held():
            for read in reads:
                if not read.cancel():
                    read.exception()  # a thread may still be writing to the slot: wait for it
            self._pool.release(slots)
        self._is_reading = False

    def _epochs_to_read(self, epoch: int, batch: int) -> Iterator[tuple[PlanT, int, int]]:
        """Plans from a place on, each with its first batch and the one at which reading ends.

        Ends before a block that the harvest has not finished.
        """
        first = epoch
        while epoch != self.data.num_blocks:
            if self.data.blocks is not None and epoch > first and not self.data.blocks.ready(epoch):
                return
            self._scheduled = epoch
            plan = self.plan(epoch)
            stop = plan.num_batches
            if self._stop is not None and self._stop[0] <= epoch:
                stop = min(stop, self._stop[1]) if self._stop[0] == epoch else 0
            if not stop:
                return
            yield plan, batch, stop
            if stop < plan.num_batches:
                return
            epoch, batch = epoch + 1, 0

    def _is_read(self, read: "Future[None]") -> bool:
        """Wait for a read; False where it met damage that is to be skipped, which is logged once per object."""
        try:
            read.result()
        except DamagedObjectError as error:
            if not self.skips_damaged:
                raise
            if error.key not in self._reported:
                self._reported.add(error.key)
                log.warning("skipping what cannot be read: %s", error)
            return False
        return True

    def _gather(self, site: str, index_N: Tensor, out_N_D: Tensor) -> None:
        """Rows slot * T + position of the pool, on the stream's device and in its type."""
        rows = self._pool.rows_SxT_D[site]
        if rows.device.type == "cuda":  # by way of pinned memory, which the copy may read later: the host does not wait
            index_N = index_N.pin_memory().to(rows.device, non_blocking=True)
        if rows.dtype == out_N_D.dtype and rows.device == out_N_D.device:
            self._pool.gather(site, index_N, out_N_D)
            return
        if out_N_D.device.type == "cuda" and rows.device.type == "cpu":
            # Pinned memory comes back to torch's cache when the copy is done; the type is changed on the device.
            staged_N_D = torch.empty(len(index_N), rows.shape[1], dtype=rows.dtype, pin_memory=True)
            self._pool.gather(site, index_N, staged_N_D)
            out_N_D.copy_(staged_N_D.to(out_N_D.device, non_blocking=True))
            return
        staged_N_D = self._buffer("staged", site, len(index_N))
        self._pool.gather(site, index_N, staged_N_D)
        out_N_D.copy_(staged_N_D)

    def _buffer(self, purpose: str, site: str, num_rows: int) -> Tensor:
        """The first `num_rows` rows of a buffer that is kept between batches."""
        rows = self._pool.rows_SxT_D[site]
        if (purpose, site) not in self._buffers or len(self._buffers[purpose, site]) < num_rows:
            device, dtype = (self._device, self._dtype) if purpose == "out" else (rows.device, rows.dtype)
            pinned = device.type == "cpu" and self._device.type == "cuda"
            self._buffers[purpose, site] = torch.empty(
                num_rows, rows.shape[1], device=device, dtype=dtype, pin_memory=pinned
            )
        return self._buffers[purpose, site][:num_rows]
