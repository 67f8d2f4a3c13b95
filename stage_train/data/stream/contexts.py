"""Batches of whole contexts in the order that ContextOrder fixes, for encoders that attend.

An epoch is one permutation of its contexts, cut into batches; of each batch the ranks take contiguous shares, in rank
order. Nothing else moves: the same order at any number of processes, and a resume anywhere at any number.

Shape letters: C contexts of this rank's batch, T positions, D a width.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.basics.errors import GranaryError
from stage_train.data.stream.base import StoreStream
from stage_train.data.stream.batch import ContextBatch
from stage_train.data.stream.data import TrainingData
from stage_train.data.stream.permutation import Purpose, random_order
from stage_train.data.stream.pool import slots_for


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextOrder:
    """What fixes the order of a stream of contexts, beside its data."""

    batch_size: int
    """Positions per global batch, those included that are not learnt from."""
    seq_len: int
    """Positions per context."""
    seed: int
    """Same seed, same order."""
    drop_last: bool = False
    """Leave out an epoch's last batch when it is short."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.seq_len:
            raise GranaryError(
                f"stream.batch_size={self.batch_size}: this variant learns from whole contexts, of {self.seq_len} "
                f"positions: give a multiple of {self.seq_len}"
            )
        if self.seed < 0:
            raise GranaryError(f"seed={self.seed}: it must not be negative")

    @property
    def batch_contexts(self) -> int:
        """Contexts per global batch."""
        return self.batch_size // self.seq_len

    @property
    def contexts_held(self) -> int:
        """Contexts that all ranks together have in use."""
        return self.batch_contexts

    @property
    def batches_alike(self) -> bool:
        """How many tokens of a context are learnt from differs."""
        return False

    def plan(self, counts: NDArray[np.int64], contexts: NDArray[np.int64], epoch: int) -> "ContextPlan":
        """The order of an epoch that reads these contexts."""
        return ContextPlan(counts, contexts, self, epoch)


class ContextPlan:
    """The order of one epoch over the given contexts."""

    def __init__(self, counts: NDArray[np.int64], contexts: NDArray[np.int64], order: ContextOrder, epoch: int) -> None:
        """`counts` int64 [C]: trainable tokens of every context; `contexts`: rows of it that this epoch reads."""
        self.order, self.epoch = order, epoch
        self._contexts = contexts[random_order(len(contexts), Purpose.CONTEXTS, order.seed, epoch)]
        full, rest = divmod(len(contexts), order.batch_contexts)
        self.num_batches = full + (1 if rest and not order.drop_last else 0)
        ends = np.concatenate([[0], np.cumsum(counts[self._contexts])])
        self.num_tokens = int(ends[-1])
        firsts = np.minimum(np.arange(full + 2) * order.batch_contexts, len(contexts))
        self._tokens = ends[firsts]

    def rows_of(self, batch: int) -> NDArray[np.int64]:
        """The contexts of a batch, as rows of TrainingData."""
        return self._contexts[batch * self.order.batch_contexts : (batch + 1) * self.order.batch_contexts]

    def tokens_before(self, batch: int) -> int:
        """Trainable tokens of the batches before `batch`."""
        return int(self._tokens[batch])

    def batches_for(self, tokens: int) -> int:
        """The fewest batches that hold `tokens` tokens."""
        return int(np.searchsorted(self._tokens, tokens))


@dataclass(slots=True)
class _Held:
    """A context on its way into memory, or there."""

    row: int
    slot: int
    read: "Future[None]"


class ContextStream(StoreStream[ContextOrder, ContextPlan, ContextBatch]):
    """The stream of dictionaries whose unit is a sequence."""

    def __init__(
        self,
        data: TrainingData,
        sites: Mapping[str, tuple[int, torch.dtype]],
        order: ContextOrder,
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

        `prefetch_bytes` is what may be read ahead, beside the contexts of a batch (shared out among the ranks), up to
        as many. Raises GranaryError when the contexts of a batch do not divide among `world` ranks.
        """
        contexts = order.batch_contexts
        if contexts % world:
            raise GranaryError(
                f"stream.batch_size={order.batch_size}: {contexts} contexts do not divide among {world} processes: "
                f"give a multiple of {world * order.seq_len}"
            )
        context_bytes = sum(data.seq_len * width * dtype.itemsize for width, dtype in sites.values())
        slots = slots_for(
            contexts // world, contexts, 1, contexts,
            prefetch_bytes=prefetch_bytes, context_bytes=context_bytes, world=world,
        )  # fmt: skip
        super().__init__(
            data, sites, order, slots,
            device=device, dtype=dtype, io_threads=io_threads, pool_device=pool_device, skip_damaged=skip_damaged,
        )  # fmt: skip
        self.rank, self.world = rank, world
        self._queue: deque[_Held] = deque()
        self._schedule: Iterator[int] = iter(())

    def make_plan(self, epoch: int) -> ContextPlan:
        """The order of an epoch."""
        return self.order.plan(self.data.counts, self.data.rows_of_epoch(self.order.seed, epoch), epoch)

    def _own(self, plan: ContextPlan, batch: int) -> NDArray[np.int64]:
        """This rank's contexts of a batch."""
        return np.array_split(plan.rows_of(batch), self.world)[self.rank]

    def _begin(self, plan: ContextPlan, batch: int) -> None:
        self._schedule = self._rows_in_need_order(plan.epoch, batch)
        self._read_ahead()

    def _enter(self, plan: ContextPlan, *, anew: bool) -> None:
        if anew:
            self._begin(plan, 0)

    def _held(self) -> Iterator[tuple[list[int], "Sequence[Future[None]]"]]:
        while self._queue:
            held = self._queue.popleft()
            yield [held.slot], [held.read]

    def _rows_in_need_order(self, epoch: int, batch: int) -> Iterator[int]:
        for plan, first, stop in self._epochs_to_read(epoch, batch):
            for number in range(first, stop):
                yield from self._own(plan, number).tolist()

    def _read_ahead(self) -> None:
        """Start a read for every free slot."""
        while self._pool.num_free:
            row = next(self._schedule, None)
            if row is None:
                return
            self._queue.append(_Held(row, *self._pool.fetch(row)))

    def _take(self, plan: ContextPlan) -> ContextBatch:
        own = self._own(plan, self._batch)
        held = [self._queue.popleft() for _ in own]
        begin = time.perf_counter()
        read = [one for one in held if self._is_read(one.read)]
        self.wait_seconds += time.perf_counter() - begin
        length, rows = self.data.seq_len, np.array([one.row for one in read], np.int64)
        self.skipped_tokens += int(self.data.counts[own].sum() - self.data.counts[rows].sum())
        slots_C1 = torch.tensor([one.slot for one in read], dtype=torch.int64)[:, None]
        index_N = (slots_C1 * length + torch.arange(length)).flatten()
        activations = {}
        for site in self._pool.rows_SxT_D:
            out_N_D = self._buffer("out", site, len(own) * length)[: len(index_N)]
            self._gather(site, index_N, out_N_D)
            activations[site] = out_N_D.view(len(rows), length, out_N_D.shape[1])
        self._pool.release([one.slot for one in held])
        self._read_ahead()
        all_rows = plan.rows_of(self._batch)
        return ContextBatch(
            activations,
            self.data.documents.of(rows).to(self._device),
            torch.from_numpy(self.data.mask_of(rows)),
            self._epoch,
            self._batch,
            num_tokens=int(self.data.counts[all_rows].sum()),
            most_contexts=-(-len(all_rows) // self.world),
        )
