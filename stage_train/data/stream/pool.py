"""Contexts in memory: a fixed number of slots, filled by reading threads ahead of need.

Threads, not processes: reads and checksums release the GIL, and a slot is filled where the batches are gathered from,
without a copy between. On a GPU the slots are in device memory, filled through pinned staging buffers on a stream of
their own.

Shape letters: S slots, T tokens per context, D d_model, N rows.
"""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from shared.store.buffers import empty_to_read
from stage_train.data.stream.data import TrainingData

P = ParamSpec("P")
T = TypeVar("T")


def slots_for(
    share: int, lanes: int, mix_contexts: int, contexts: int, *, prefetch_bytes: int, context_bytes: int, world: int
) -> int:
    """Contexts that a rank holds which owns `share` of the `lanes`: being mixed, and read ahead within its budget.

    `contexts` are those of an epoch; `prefetch_bytes` is what all `world` ranks together may read ahead.
    """
    mixing = share * min(mix_contexts, -(-contexts // lanes))
    return mixing + min(prefetch_bytes // (context_bytes * world), mixing)


class ContextPool:
    """S slots of one context each, for every site the same slot number."""

    def __init__(
        self,
        data: TrainingData,
        sites: Mapping[str, tuple[int, torch.dtype]],
        *,
        slots: int,
        io_threads: int,
        device: torch.device,
    ) -> None:
        """`sites` maps a name to (width, dtype read); memory is S * T * sum(D * itemsize) bytes on `device`."""
        self._data = data
        self._seq_len = data.seq_len
        self.rows_SxT_D = {
            name: empty_to_read((slots * self._seq_len, width), dtype)
            if device.type == "cpu"
            else torch.empty(slots * self._seq_len, width, dtype=dtype, device=device)
            for name, (width, dtype) in sites.items()
        }
        self._free = list(range(slots - 1, -1, -1))
        self._executor = ThreadPoolExecutor(io_threads, thread_name_prefix="granary-read")
        self._device = device
        self._local = threading.local()
        self._gathered: torch.cuda.Event | None = None

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        """Memory the slots take."""
        return sum(rows.nbytes for rows in self.rows_SxT_D.values())

    def fetch(self, row: int) -> tuple[int, "Future[None]"]:
        """Take a free slot and start reading a context into it; the future fails as the read fails."""
        slot = self._free.pop()
        return slot, self._executor.submit(self._read, row, slot, self._gathered)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Run something small on a reading thread."""
        return self._executor.submit(function, *args, **kwargs)

    def gather(self, site: str, index_N: Tensor, out_N_D: Tensor) -> None:
        """Rows slot * T + position, into `out_N_D` (on the pool's device, of the type read)."""
        torch.index_select(self.rows_SxT_D[site], 0, index_N, out=out_N_D)

    def release(self, slots: list[int]) -> None:
        """Give slots back; what was gathered from them before may still be running on the device."""
        if self._device.type == "cuda":
            self._gathered = torch.cuda.current_stream(self._device).record_event()
        self._free.extend(slots)

    def close(self) -> None:
        """Stop the threads; reads not yet begun are dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _read(self, row: int, slot: int, gathered: "torch.cuda.Event | None") -> None:
        span = slice(slot * self._seq_len, (slot + 1) * self._seq_len)
        for site, rows_SxT_D in self.rows_SxT_D.items():
            if self._device.type != "cuda":
                self._data.read(row, site, rows_SxT_D[span])
                continue
            stream, staging_T_D = self._staging(site)
            self._data.read(row, site, staging_T_D)
            with torch.cuda.stream(stream):
                if gathered is not None:
                    stream.wait_event(gathered)
                rows_SxT_D[span].copy_(staging_T_D, non_blocking=True)
            stream.synchronize()

    def _staging(self, site: str) -> "tuple[torch.cuda.Stream, Tensor]":
        """This thread's copy stream and its pinned buffer for a site."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._local.buffers = {}
        buffers: dict[str, Tensor] = self._local.buffers
        if site not in buffers:
            rows = self.rows_SxT_D[site]
            buffers[site] = empty_to_read((self._seq_len, rows.shape[1]), rows.dtype, pin=True)
        return self._local.stream, buffers[site]
