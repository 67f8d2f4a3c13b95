"""Batches of activations in the order that StreamOrder fixes, read ahead of need within a byte budget.

Several processes serve one stream: rank r owns an equal, contiguous share of the lanes, and the ranks' batches
concatenated in rank order are the global batch, whatever their number. The state is (epoch, batch index) and nothing
else, so a run may stop anywhere and continue with another number of processes.

Shape letters: N rows of this rank's batch, D d_model.
"""

import heapq
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.store import DamagedObjectError
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.epoch import EpochPlan, StreamOrder
from stage_train.data.stream.permutation import lanes_per_rank
from stage_train.data.stream.pool import ContextPool, slots_for

log = logging.getLogger(__name__)

DAMAGED = -1  # in a group's index: the place of a token that cannot be read and is left out


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's rows of one global batch."""

    activations: dict[str, Tensor]
    """[N, D] for every site, row i of all sites the same token; overwritten by the next call of the stream."""
    epoch: int
    index: int
    """Number of the batch within its epoch."""
    num_tokens: int
    """Rows of the global batch, all ranks together, those included that `skip_damaged` left out."""
    most_rows: int
    """Rows of the rank that has most, likewise."""


@dataclass(slots=True)
class _Group:
    """The contexts that a lane mixes at a time, on their way into memory or being handed out."""

    epoch: int
    rows: NDArray[np.int64]
    order: "Future[NDArray[np.int64]]"
    used: int = 0
    slots: list[int] = field(default_factory=list)
    reads: "list[Future[None]]" = field(default_factory=list)
    index: Tensor | None = None
    whole: bool = True
    """False where some of `index` is DAMAGED."""


class BatchStream(Protocol):
    """What training asks of whatever hands out batches."""

    wait_seconds: float
    """Time spent waiting for rows since the stream was made."""
    skipped_tokens: int
    """Tokens that this rank has left out of the batches handed out since the stream was made."""
    skips_damaged: bool

    def __next__(self) -> Batch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; the same on every rank."""

    def ends_epoch(self, batch: Batch) -> bool:
        """Whether `batch`, the last that was handed out, is its epoch's last."""

    def epochs_passed(self) -> int:
        """Epochs of which every batch has been handed out."""


class TokenStream:
    """An endless (or bounded) iterator over batches, with exact resume at any number of processes."""

    def __init__(
        self,
        data: TrainingData,
        sites: Mapping[str, tuple[int, torch.dtype]],
        order: StreamOrder,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        io_threads: int = 4,
        prefetch_bytes: int = 1 << 30,
        pool_device: torch.device | str | None = None,
        skip_damaged: bool = False,
    ) -> None:
        """`sites` maps each site to (width, dtype the store reads).

        `skip_damaged` leaves out the tokens of contexts that raise DamagedObjectError, instead of raising it. Every
        other token stays in its batch, so order and state are those of the undamaged store.

        `prefetch_bytes` is what may be read ahead, beside the lanes * mix_contexts contexts that are being mixed
        (shared out among the ranks). Raises GranaryError when the lanes do not divide among `world` ranks.
        """
        self.data, self.order = data, order
        self._plans: dict[int, EpochPlan] = {}
        contexts = data.fewest_contexts(order.seed)
        lanes, share = lanes_per_rank(order.lanes, contexts, world)
        self.num_lanes = lanes
        self.own_lanes = range(rank * share, (rank + 1) * share)
        context_bytes = sum(data.seq_len * width * dtype.itemsize for width, dtype in sites.values())
        most = contexts if data.blocks is None else int(np.diff(data.blocks.firsts).max())
        slots = slots_for(
            share,
            lanes,
            order.mix_contexts,
            most,
            prefetch_bytes=prefetch_bytes,
            context_bytes=context_bytes,
            world=world,
        )
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
        self._offsets: list[int] = []
        self._queues: dict[int, deque[_Group]] = {lane: deque() for lane in self.own_lanes}
        self._schedule: Iterator[tuple[EpochPlan, int, int, int]] | None = None
        self._scheduled = 0  # the last epoch that the schedule has come to
        self._filling: _Group | None = None

    @property
    def buffer_bytes(self) -> int:
        """Memory for contexts on this rank: being mixed and read ahead."""
        return self._pool.num_bytes

    def stop_at(self, epoch: int, batch: int) -> None:
        """Hand out no batch from (epoch, batch) on, and read nothing that only later batches need."""
        self._stop = (epoch, batch)
        self._rewind()

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        if epoch not in self._plans:
            for old in [e for e in self._plans if e < self._epoch]:
                del self._plans[old]
            rows = self.data.rows_of_epoch(self.order.seed, epoch)
            self._plans[epoch] = EpochPlan(self.data.counts, rows, self.order, epoch, self.num_lanes)
        return self._plans[epoch]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; the same on every rank."""
        return {"epoch": self._epoch, "batch": self._batch, "order": asdict(self.order), "tokens": self.data.num_tokens}

    def ends_epoch(self, batch: Batch) -> bool:
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

    def __next__(self) -> Batch:
        """The next batch. Raises GranaryError naming the shard when a read fails."""
        if self._batch >= self.plan(self._epoch).num_batches:
            self._next_epoch()
        if (self._stop is not None and (self._epoch, self._batch) >= self._stop) or self._epoch == self.data.num_blocks:
            raise StopIteration
        plan = self.plan(self._epoch)
        if self._schedule is None:
            self._wait_for_block()
            self._offsets = plan.offsets_at(self._batch)
            self._schedule = self._groups_in_need_order(self._epoch, self._batch)
            self._read_ahead()
        ends = plan.offsets_at(self._batch + 1)
        taken = [end - start for start, end in zip(self._offsets, ends, strict=True)]
        activations = self._collect({lane: taken[lane] for lane in self.own_lanes})
        share = len(self.own_lanes)
        most_rows = max(sum(taken[first : first + share]) for first in range(0, len(taken), share))
        batch = Batch(activations, self._epoch, self._batch, sum(taken), most_rows)
        self._offsets = ends
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
            raise GranaryError(
                f"an epoch has {self.data.num_tokens} tokens, fewer than one batch of {self.order.batch_size}: "
                "use a smaller stream.batch_size or stream.drop_last=false"
            )
        self._epoch, self._batch = self._epoch + 1, 0
        if self._schedule is None:
            return
        if self._epoch == self.data.num_blocks or (self._stop is not None and (self._epoch, 0) >= self._stop):
            return
        self._offsets = self.plan(self._epoch).offsets_at(0)
        if self._scheduled < self._epoch:  # reading ahead ended where the harvest was
            self._wait_for_block()
            self._schedule = self._groups_in_need_order(self._epoch, 0)
        for queue in self._queues.values():
            while queue and queue[0].epoch < self._epoch:  # what drop_last left over
                self._pool.release(queue.popleft().slots)
        self._read_ahead()

    def _rewind(self) -> None:
        """Forget what was read ahead; the next batch starts reading anew at the current position."""
        for queue in self._queues.values():
            for group in queue:
                for read in group.reads:
                    if not read.cancel():
                        read.exception()  # a thread may still be writing to the slot: wait for it
                self._pool.release(group.slots)
            queue.clear()
        self._schedule = self._filling = None

    def _groups_in_need_order(self, epoch: int, batch: int) -> Iterator[tuple[EpochPlan, int, int, int]]:
        """(plan, lane, group, tokens to skip) in exactly the order in which __next__ will ask for them.

        That order is what makes a fixed number of slots enough: whatever holds a slot is needed before what waits.
        Ends before a block that the harvest has not finished.
        """
        first = epoch
        while True:
            if epoch == self.data.num_blocks:
                return
            if self.data.blocks is not None and epoch > first and not self.data.blocks.ready(epoch):
                return
            self._scheduled = epoch
            plan = self.plan(epoch)
            if not plan.num_batches:
                return
            stop = plan.num_batches
            if self._stop is not None and self._stop[0] <= epoch:
                stop = min(stop, self._stop[1]) if self._stop[0] == epoch else 0
            offsets = plan.offsets_at(batch)
            heap = []
            for lane in self.own_lanes:
                group = plan.lanes[lane].group_of(offsets[lane])
                if group < plan.lanes[lane].num_groups:
                    heap.append((max(plan.first_batch(lane, group), batch), lane, group))
            heapq.heapify(heap)
            while heap and heap[0][0] < stop:
                _, lane, group = heap[0]
                tokens = plan.lanes[lane].group_tokens
                yield plan, lane, group, max(offsets[lane] - tokens[group], 0)
                if group + 1 < plan.lanes[lane].num_groups:
                    heapq.heapreplace(heap, (plan.first_batch(lane, group + 1), lane, group + 1))
                else:
                    heapq.heappop(heap)
            if stop < plan.num_batches:
                return
            epoch, batch = epoch + 1, 0

    def _read_ahead(self) -> None:
        """Start a read for every free slot."""
        while self._pool.num_free:
            if self._filling is None:
                upcoming = next(self._schedule, None) if self._schedule else None
                if upcoming is None:
                    return
                plan, lane, number, skip = upcoming
                order = self._pool.submit(plan.token_order, lane, number)
                rows = plan.lanes[lane].contexts_of(number)
                self._filling = _Group(plan.epoch, rows, order, used=skip)
                self._queues[lane].append(self._filling)
            group = self._filling
            slot, read = self._pool.fetch(int(group.rows[len(group.slots)]))
            group.slots.append(slot)
            group.reads.append(read)
            if len(group.slots) == len(group.rows):
                self._filling = None

    def _collect(self, needs: Mapping[int, int]) -> dict[str, Tensor]:
        """Gather the next tokens of this rank's lanes, lane by lane: float [N, D] for every site.

        N is less than the sum of the needs where damaged tokens are skipped.
        """
        out = {site: self._buffer("out", site, sum(needs.values())) for site in self._pool.rows_SxT_D}
        pieces: list[Tensor] = []
        spent: list[int] = []
        done = 0
        for lane, need in needs.items():
            while need:
                queue = self._queues[lane]
                if not queue or len(queue[0].slots) < len(queue[0].rows):
                    done = self._flush(pieces, spent, out, done)  # it waits for the slots of what was just used up
                group = queue[0]
                if group.index is None:
                    self._await(group)
                assert group.index is not None
                taken = group.index[group.used : group.used + need]
                need -= len(taken)
                group.used += len(taken)
                if not group.whole:
                    kept = taken[taken != DAMAGED]
                    self.skipped_tokens += len(taken) - len(kept)
                    taken = kept
                pieces.append(taken)
                if group.used == len(group.index):
                    spent += group.slots
                    queue.popleft()
        done = self._flush(pieces, spent, out, done)
        return {site: rows_N_D[:done] for site, rows_N_D in out.items()}

    def _await(self, group: _Group) -> None:
        """Wait until a group's contexts are in memory, then fix the order of its tokens."""
        begin = time.perf_counter()
        read = [self._is_read(read) for read in group.reads]
        order = group.order.result()
        self.wait_seconds += time.perf_counter() - begin
        length = self.data.seq_len
        rows = [
            slot * length + positions if intact else np.full(len(positions), DAMAGED)
            for slot, positions, intact in zip(group.slots, map(self.data.positions, group.rows), read, strict=True)
        ]
        group.whole = all(read)
        group.index = torch.from_numpy(np.concatenate(rows)[order])

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

    def _flush(self, pieces: list[Tensor], spent: list[int], out: Mapping[str, Tensor], done: int) -> int:
        """Gather the collected pieces into `out` from row `done` on, free their slots, and read ahead into those."""
        if pieces:
            index_N = torch.cat(pieces)
            for site, out_N_D in out.items():
                self._gather(site, index_N, out_N_D[done : done + len(index_N)])
            done += len(index_N)
            pieces.clear()
        if spent:
            self._pool.release(spent)
            spent.clear()
        self._read_ahead()
        return done

    def _gather(self, site: str, index_N: Tensor, out_N_D: Tensor) -> None:
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
