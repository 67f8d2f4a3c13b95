"""Rows of committed shards into the caller's memory, each chunk checked against the commit record.

Shapes: T positions, D = d_model, n contexts.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.basics.errors import GranaryError
from shared.launch import commands
from shared.store.buffers import bits_of, byte_view, empty_to_read
from shared.store.format import layout
from shared.store.format.checksum import CRC_BYTES, crc32c
from shared.store.format.dtypes import scales_per_row, storage_type
from shared.store.format.layout import StorePlan
from shared.store.format.manifest import DamagedObjectError, ShardRecord
from shared.store.format.quantise import dequantise
from shared.store.format.shard import ArrayRecord, decode_chunk
from shared.store.format.site_path import scale_path, site_path
from shared.store.io.base import ObjectIO, ObjectMissingError, ObjectShortError
from shared.store.io.threads import on_threads


class ContextReader:
    """Reads contexts of shards whose plans share one format. Safe to use from several threads."""

    def __init__(self, io: ObjectIO, plan: StorePlan) -> None:
        self.io = io
        self.plan = plan
        self.kind = storage_type(plan.dtype)
        self.chunks_per_context = plan.chunks_per_context
        self._scratch = threading.local()

    def read(self, hook: str, record: ShardRecord, context: int, out: torch.Tensor, verify: bool) -> None:
        """Context `context` of `record`'s shard into contiguous `out` [T, D] of the read dtype."""
        T, D = self.plan.seq_len, self.plan.hooks[hook]
        main = record.arrays[site_path(hook)]
        slot = context - record.first_context
        if self.plan.dtype != "int8":
            self._read_rows(main, record.shard, slot, bits_of(out), verify)
            return
        q_TD = self._buffer("int8", (T, D), torch.int8)
        scale_TG = self._buffer("scale", (T, scales_per_row(D)), torch.float16)
        self._read_rows(main, record.shard, slot, bits_of(q_TD), verify)
        self._read_rows(record.arrays[scale_path(hook)], record.shard, slot, bits_of(scale_TG), verify)
        dequantise(q_TD, scale_TG, out)

    def _read_rows(self, record: ArrayRecord, shard: int, slot: int, out: npt.NDArray[Any], verify: bool) -> None:
        """One context of one object: a contiguous run of chunks, fetched with one request."""
        first = slot * self.chunks_per_context
        sizes = record.chunk_bytes[first : first + self.chunks_per_context].tolist()
        crcs = record.crc32c[first : first + self.chunks_per_context].tolist()
        offset = int(record.chunk_bytes[:first].sum())
        rows = out.reshape(self.chunks_per_context, self.plan.chunk_rows, -1)
        compressed = self.plan.codec != "none"
        if compressed:
            whole = memoryview(self._bytes("encoded", sum(sizes)))
            ends = np.cumsum(sizes).tolist()
            chunks = [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            views = [view for chunk in chunks for view in (chunk[:-CRC_BYTES], chunk[-CRC_BYTES:])]
        else:
            views = [view for chunk in rows for view in (byte_view(chunk), memoryview(bytearray(CRC_BYTES)))]
        found = self._fetch(record.key, shard, offset, views, verify)
        if verify:
            for number, (crc, recorded) in enumerate(zip(found[::2], crcs, strict=True)):
                if crc != recorded:
                    raise damaged(self.io.url, record.key, shard, f"fails its checksum in chunk {first + number}")
        payloads = views[::2]
        if compressed:
            for payload, chunk in zip(payloads, rows, strict=True):
                decode_chunk(payload, self.plan.codec, chunk)

    def _fetch(self, key: str, shard: int, offset: int, views: list[memoryview], checked: bool) -> list[int]:
        """Fill `views` from an object that a commit record names: where it is gone or short, the shard is damaged.

        Returns the checksum of each view where `checked`.
        """
        try:
            if checked:
                return self.io.read_checked(key, offset, views)
            self.io.read_into(key, offset, views)
        except ObjectMissingError as error:
            raise damaged(self.io.url, key, shard, "is missing") from error
        except ObjectShortError as error:
            raise damaged(self.io.url, key, shard, "is shorter than its commit record says") from error
        return []

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Lend a tensor, which this thread uses again and again."""
        tensor: torch.Tensor | None = getattr(self._scratch, name, None)
        if tensor is None or tuple(tensor.shape) != shape:
            tensor = empty_to_read(shape, dtype)
            setattr(self._scratch, name, tensor)
        return tensor

    def _bytes(self, name: str, size: int) -> bytearray:
        """Lend at least `size` bytes, which this thread uses again and again."""
        buffer: bytearray | None = getattr(self._scratch, name, None)
        if buffer is None or len(buffer) < size:
            buffer = bytearray(size)
            setattr(self._scratch, name, buffer)
        return buffer


def damaged(url: str, key: str, shard: int, what: str) -> DamagedObjectError:
    """The error that a reader raises at a torn or flipped object, and how to mend it."""
    return DamagedObjectError(
        f"shard {shard} of {url} is damaged: {key} {what}; run "
        f"`{commands.line('store', 'drop-incomplete', '--damaged', url)}` and harvest again",
        key=key,
        shard=shard,
    )


def read_token_contexts(
    io: ObjectIO, plan: StorePlan, name: str, contexts: Iterable[int], shard_of: Callable[[int], int]
) -> npt.NDArray[Any]:
    """Rows of an array of `plan.token_arrays`, [n, T, ...]; `shard_of` says in which shard a context is, or raises."""
    array = plan.token_arrays[name]
    is_array = isinstance(contexts, np.ndarray)
    asked = np.asarray(contexts, np.int64) if is_array else np.fromiter((int(one) for one in contexts), np.int64)
    rows = np.empty((len(asked), plan.seq_len, *array.beyond), array.numpy)
    order = np.argsort(asked, kind="stable")
    wanted = asked[order]
    firsts = np.flatnonzero(np.diff(wanted // plan.shard_contexts, prepend=-(2**62)))

    def read(span: tuple[int, int]) -> None:
        some = wanted[slice(*span)]
        shard = shard_of(int(some[0]))
        shard_of(int(some[-1]))  # a shard's contexts are a range: what is between its ends is in it
        slots = (some - shard * plan.shard_contexts).tolist()
        rows[order[slice(*span)]] = read_token_rows(io, plan, name, shard, slots)

    on_threads(read, list(pairwise([*firsts.tolist(), len(wanted)])))
    return rows


def read_token_rows(io: ObjectIO, plan: StorePlan, name: str, shard: int, slots: Sequence[int]) -> npt.NDArray[Any]:
    """Rows `slots` (ascending) of one shard of an array of `plan.token_arrays`, [n, T, ...]."""
    array = plan.token_arrays[name]
    row_bytes = array.row_bytes(plan.seq_len)
    first, last = slots[0], slots[-1]
    key = layout.object_key(name, shard, array.ndim)
    read_NB = np.empty((last - first + 1, row_bytes + CRC_BYTES), np.uint8)
    io.read_into(key, first * read_NB.shape[1], [byte_view(read_NB)])
    index_n = np.asarray(slots) - first
    rows_nB = np.ascontiguousarray(read_NB[index_n, :row_bytes])
    recorded = np.ascontiguousarray(read_NB[index_n, row_bytes:]).view("<u4")[:, 0].tolist()
    payload, start = byte_view(rows_nB), 0
    for slot, crc in zip(slots, recorded, strict=True):
        if crc32c(payload[start : start + row_bytes]) != crc:
            raise damaged(io.url, key, shard, f"fails its checksum in row {slot}")
        start += row_bytes
    return rows_nB.view(array.numpy).reshape(len(slots), plan.seq_len, *array.beyond)


def read_moments(io: ObjectIO, record: ShardRecord, hook: str, d_model: int) -> npt.NDArray[np.float64]:
    """[2, D]: mean and M2 of one shard."""
    array = record.arrays[layout.statistics_path(hook)]
    moments = np.empty((2, d_model), "<f8")
    crc = bytearray(CRC_BYTES)
    io.read_into(array.key, 0, [byte_view(moments), memoryview(crc)])
    if crc32c(byte_view(moments)) != int(array.crc32c[0]):
        raise damaged(io.url, array.key, record.shard, "fails its checksum")
    return moments


def read_dtype_error(hook: str, out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> GranaryError:
    """Why `out` can't take a context."""
    return GranaryError(
        f"{hook}: a context is {dtype} of shape {shape}, the buffer given for it is {out.dtype} of shape "
        f"{tuple(out.shape)}"
    )
