"""One-object-per-shard Zarr v3 arrays, written by appending rows and read by ranges of rows.

zarr-python and every other Zarr v3 reader reads them too. They are read here without it because a page needs a dozen
small ranges within milliseconds. What is read is data from a stranger: types, sizes and places are checked first.
"""

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.documents import parse_json
from shared.basics.errors import GranaryError
from shared.latents.layout import ArraySpec
from shared.store.format.checksum import CRC_BYTES, crc32c, crc_bytes, crc_from_bytes
from shared.store.format.layout import object_key
from shared.store.format.metadata import array_document
from shared.store.format.shard import ABSENT, blosc, encode_index, index_bytes
from shared.store.io.base import ObjectIO

CODEC = "zstd"
CHUNKS_PER_SHARD = 256
CACHED_BYTES = 64 << 20  # decoded chunks that a folder keeps
READ_THREADS = 8


class ArrayWriter:
    """Appends rows to one array; an object is put as soon as its rows are there, ``zarr.json`` by `close`."""

    def __init__(self, io: ObjectIO, path: str, spec: ArraySpec, row_shape: tuple[int, ...]) -> None:
        self.io, self.path, self.spec, self.row_shape = io, path, spec, row_shape
        self.num_rows = 0
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._rows: list[npt.NDArray[Any]] = []  # of the chunk that is not full yet
        self._chunks: list[bytes] = []  # of the shard that is not full yet
        self._shard = 0
        # blosc's output is a pure function of its input on any thread but the main one.
        self._thread = ThreadPoolExecutor(1)

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Rows [n, *row_shape], whose values must fit the array's type."""
        stored = np.ascontiguousarray(rows, dtype=self._dtype)
        if stored.shape[1:] != self.row_shape:
            raise GranaryError(f"{self.path} has rows of shape {self.row_shape}, not {stored.shape[1:]}")
        self.num_rows += len(stored)
        while len(stored):
            room = self.spec.chunk_rows - sum(map(len, self._rows))
            self._rows.append(stored[:room])
            stored = stored[room:]
            if sum(map(len, self._rows)) == self.spec.chunk_rows:
                self._flush_chunk()

    def close(self) -> None:
        """Write what is left and say what the array is."""
        if self._rows:
            self._flush_chunk()
        if self._chunks:
            self._flush_shard()
        self._thread.shutdown()
        tail, rows = self.row_shape, self.spec.chunk_rows
        document = array_document(
            dtype=self.spec.dtype,
            fill=False if self.spec.dtype == "bool" else 0,
            shape=(self.num_rows, *tail),
            shard=(rows * CHUNKS_PER_SHARD, *tail),
            chunk=(rows, *tail),
            names=self.spec.axes,
            codec=CODEC,
        )
        self.io.put(f"{self.path}/zarr.json", [document.encode()], replace=True)

    def _flush_chunk(self) -> None:
        rows = np.zeros((self.spec.chunk_rows, *self.row_shape), self._dtype)
        at = 0
        for part in self._rows:
            rows[at : at + len(part)] = part
            at += len(part)
        payload = self._thread.submit(blosc(CODEC, self._dtype.itemsize).encode, rows).result()
        self._chunks.append(bytes(payload) + crc_bytes(crc32c(payload)))
        self._rows = []
        if len(self._chunks) == CHUNKS_PER_SHARD:
            self._flush_shard()

    def _flush_shard(self) -> None:
        index = encode_index([len(chunk) for chunk in self._chunks], CHUNKS_PER_SHARD)
        key = object_key(self.path, self._shard, 1 + len(self.row_shape))
        self.io.put(key, [*self._chunks, index], replace=True)
        self._chunks, self._shard = [], self._shard + 1


class ChunkCache:
    """The decoded chunks read last, of all arrays of a folder. Safe to use from several threads."""

    def __init__(self, num_bytes: int = CACHED_BYTES) -> None:
        self._num_bytes, self._held = num_bytes, 0
        self._chunks: OrderedDict[tuple[str, int], npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, chunk: int) -> npt.NDArray[Any] | None:
        """A chunk, if it is here."""
        with self._lock:
            found = self._chunks.get((path, chunk))
            if found is not None:
                self._chunks.move_to_end((path, chunk))
            return found

    def put(self, path: str, chunk: int, rows: npt.NDArray[Any]) -> None:
        """Keep a chunk, and let go of those used longest ago."""
        with self._lock:
            if (path, chunk) not in self._chunks:
                self._chunks[path, chunk] = rows
                self._held += rows.nbytes
            while self._held > self._num_bytes and len(self._chunks) > 1:
                self._held -= self._chunks.popitem(last=False)[1].nbytes


class ArrayReader:
    """Rows of one array. Safe to use from several threads."""

    def __init__(self, io: ObjectIO, path: str, spec: ArraySpec, row_shape: tuple[int, ...], cache: ChunkCache) -> None:
        self.io, self.path, self.spec, self.row_shape, self.cache = io, path, spec, row_shape, cache
        self.dtype = np.dtype(spec.dtype).newbyteorder("<")
        self.num_rows = self._check(f"{path}/zarr.json")
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows [start, stop); those that are not there are left out."""
        start, stop = max(0, start), min(stop, self.num_rows)
        step = self.spec.chunk_rows
        chunks = self._chunks(range(start // step, math.ceil(stop / step)) if stop > start else range(0))
        parts = [rows[max(0, start - number * step) : stop - number * step] for number, rows in sorted(chunks.items())]
        return np.concatenate([np.empty((0, *self.row_shape), self.dtype), *parts])

    def row(self, index: int) -> npt.NDArray[Any]:
        """One row."""
        return self.take(np.array([index]))[0]

    def all(self) -> npt.NDArray[Any]:
        """Every row."""
        return self.rows(0, self.num_rows)

    def take(self, indices: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of any order. Raises GranaryError for one that is not there."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.num_rows):
            raise GranaryError(f"{self.path} of {self.io.url} has no row {wanted.max()}: the latents folder is damaged")
        out = np.empty((len(wanted), *self.row_shape), self.dtype)
        number = wanted // self.spec.chunk_rows
        for chunk, rows in self._chunks(np.unique(number).tolist()).items():
            chosen = number == chunk
            out[chosen] = rows[wanted[chosen] - chunk * self.spec.chunk_rows]
        return out

    def _chunks(self, numbers: Iterable[int]) -> dict[int, npt.NDArray[Any]]:
        """Decoded chunks; those next to each other in an object come with one request."""
        found: dict[int, npt.NDArray[Any]] = {}
        runs: list[list[int]] = []
        for number in numbers:
            rows = self.cache.get(self.path, number)
            if rows is not None:
                found[number] = rows
            elif runs and runs[-1][-1] == number - 1 and number % CHUNKS_PER_SHARD:
                runs[-1].append(number)
            else:
                runs.append([number])
        if len(runs) < 4:
            fetched = [self._fetch(run) for run in runs]
        else:
            with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="granary-latents") as pool:
                fetched = list(pool.map(self._fetch, runs))
        for run, chunks in zip(runs, fetched, strict=True):
            for number, rows in zip(run, chunks, strict=True):
                self.cache.put(self.path, number, rows)
                found[number] = rows
        return found

    def _fetch(self, run: list[int]) -> list[npt.NDArray[Any]]:
        shard, slots = run[0] // CHUNKS_PER_SHARD, [number % CHUNKS_PER_SHARD for number in run]
        key = object_key(self.path, shard, 1 + len(self.row_shape))
        entries = self._index(key, shard)[slots]
        sizes = [int(size) for size in entries[:, 1]]
        buffers = [memoryview(bytearray(size)) for size in sizes]
        self.io.read_into(key, int(entries[0, 0]), buffers)
        return [self._decode(key, buffer) for buffer in buffers]

    def _decode(self, key: str, chunk: memoryview) -> npt.NDArray[Any]:
        payload, checksum = chunk[:-CRC_BYTES], chunk[-CRC_BYTES:]
        if crc32c(payload) != crc_from_bytes(checksum):
            raise self._damaged(key, "fails its checksum")
        out = np.empty((self.spec.chunk_rows, *self.row_shape), self.dtype)
        codec = blosc(CODEC, self.dtype.itemsize)
        if int.from_bytes(payload[4:8], "little") != out.nbytes:  # what blosc's header says it holds
            raise self._damaged(key, "holds a chunk of the wrong size")
        codec.decode(payload, out=out)
        return out

    def _index(self, key: str, shard: int) -> npt.NDArray[np.uint64]:
        """[slots, (offset, bytes)] of a shard's chunks."""
        if shard not in self._indices:
            size = self.io.size(key)
            length = index_bytes(CHUNKS_PER_SHARD)
            if size is None or size < length:
                raise self._damaged(key, "is missing or short")
            data = memoryview(bytearray(length))
            self.io.read_into(key, size - length, [data])
            if crc32c(data[:-CRC_BYTES]) != crc_from_bytes(data[-CRC_BYTES:]):
                raise self._damaged(key, "fails the checksum of its index")
            index = np.frombuffer(data[:-CRC_BYTES], "<u8").reshape(-1, 2)
            there = index[:, 0] != ABSENT
            ends = np.cumsum(index[there, 1])
            starts = ends - index[there, 1]
            if len(ends) and (ends[-1] > size or (index[there, 0] != starts).any() or index[there, 1].min() <= 20):
                raise self._damaged(key, "has an index that no writer of this format makes")
            self._indices[shard] = index
        return self._indices[shard]

    def _check(self, key: str) -> int:
        """Number of rows that ``zarr.json`` tells; raises GranaryError where it is another array than the format's."""
        try:
            found = parse_json(self.io.get(key), key)
            shape = [int(size) for size in found["shape"]]
            wanted = array_document(
                dtype=self.spec.dtype,
                fill=False if self.spec.dtype == "bool" else 0,
                shape=(shape[0], *self.row_shape),
                shard=(self.spec.chunk_rows * CHUNKS_PER_SHARD, *self.row_shape),
                chunk=(self.spec.chunk_rows, *self.row_shape),
                names=self.spec.axes,
                codec=CODEC,
            )
            intact = found == json.loads(wanted)
        except (GranaryError, ValueError, OverflowError, KeyError, TypeError, IndexError):
            intact = False
        if not intact:
            raise self._damaged(key, f"does not describe {self.spec.dtype} rows of shape {self.row_shape}")
        return shape[0]

    def _damaged(self, key: str, what: str) -> GranaryError:
        return GranaryError(f"{key} of {self.io.url} {what}: the latents folder is damaged; run granary inspect again")
