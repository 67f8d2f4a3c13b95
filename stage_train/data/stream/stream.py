"""Batches of shuffled tokens in the order that StreamOrder fixes, read ahead of need within a byte budget.

Several processes serve one stream: rank r owns an equal, contiguous share of the lanes, and the ranks' batches
concatenated in rank order are the global batch, whatever their number. The state is (epoch, batch index) and nothing
else, so a run may stop anywhere and continue with another number of processes.

Shape letters: N rows of this rank's batch, D d_model.
"""

import heapq
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stage_train.data.stream.base import StoreStream
from stage_train.data.stream.batch import Batch
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.epoch import EpochPlan, StreamOrder
from stage_train.data.stream.permutation import lanes_per_rank
from stage_train.data.stream.pool import slots_for

DAMAGED = -1  # in a group's index: the place of a token that cannot be read and is left out


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


class TokenStream(StoreStream[StreamOrder, EpochPlan, Batch]):
    """The stream of all dictionaries whose unit is a token."""

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
        """`sites` maps each site to (width, dtype the store reads); see StoreStream.

        `prefetch_bytes` is what may be read ahead, beside the lanes * mix_contexts contexts that are being mixed
        (shared out among the ranks). Raises GranaryError when the lanes do not divide among `world` ranks.
        """
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
        super().__init__(
            data, sites, order, slots,
            device=device, dtype=dtype, io_threads=io_threads, pool_device=pool_device, skip_damaged=skip_damaged,
        )  # fmt: skip
        self._offsets: list[int] = []
        self._queues: dict[int, deque[_Group]] = {lane: deque() for lane in self.own_lanes}
        self._schedule: Iterator[tuple[EpochPlan, int, int, int]] = iter(())
        self._filling: _Group | None = None

    def make_plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        rows = self.data.rows_of_epoch(self.order.seed, epoch)
        return EpochPlan(self.data.counts, rows, self.order, epoch, self.num_lanes)

    def _begin(self, plan: EpochPlan, batch: int) -> None:
        self._offsets = plan.offsets_at(batch)
        self._schedule = self._groups_in_need_order(plan.epoch, batch)
        self._read_ahead()

    def _enter(self, plan: EpochPlan, *, anew: bool) -> None:
        self._offsets = plan.offsets_at(0)
        if anew:
            self._schedule = self._groups_in_need_order(plan.epoch, 0)
        for queue in self._queues.values():
            while queue and queue[0].epoch < plan.epoch:  # what drop_last left over
                self._pool.release(queue.popleft().slots)
        self._read_ahead()

    def _take(self, plan: EpochPlan) -> Batch:
        ends = plan.offsets_at(self._batch + 1)
        taken = [end - start for start, end in zip(self._offsets, ends, strict=True)]
        activations = self._collect({lane: taken[lane] for lane in self.own_lanes})
        share = len(self.own_lanes)
        most_rows = max(sum(taken[first : first + share]) for first in range(0, len(taken), share))
        self._offsets = ends
        return Batch(activations, self._epoch, self._batch, sum(taken), most_rows)

    def _held(self) -> Iterator[tuple[list[int], "Sequence[Future[None]]"]]:
        for queue in self._queues.values():
            while queue:
                group = queue.popleft()
                yield group.slots, group.reads
        self._filling = None

    def _groups_in_need_order(self, epoch: int, batch: int) -> Iterator[tuple[EpochPlan, int, int, int]]:
        """(plan, lane, group, tokens to skip) in exactly the order in which __next__ will ask for them.

        That order is what makes a fixed number of slots enough: whatever holds a slot is needed before what waits.
        """
        for plan, first, stop in self._epochs_to_read(epoch, batch):
            offsets = plan.offsets_at(first)
            heap = []
            for lane in self.own_lanes:
                group = plan.lanes[lane].group_of(offsets[lane])
                if group < plan.lanes[lane].num_groups:
                    heap.append((max(plan.first_batch(lane, group), first), lane, group))
            heapq.heapify(heap)
            while heap and heap[0][0] < stop:
                _, lane, group = heap[0]
                tokens = plan.lanes[lane].group_tokens
                yield plan, lane, group, max(offsets[lane] - tokens[group], 0)
                if group + 1 < plan.lanes[lane].num_groups:
                    heapq.heapreplace(heap, (plan.first_batch(lane, group + 1), lane, group + 1))
                else:
                    heapq.heappop(heap)

    def _read_ahead(self) -> None:
        """Start a read for every free slot."""
        while self._pool.num_free:
            if self._filling is None:
                upcoming = next(self._schedule, None)
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
