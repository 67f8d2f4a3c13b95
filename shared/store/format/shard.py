"""The bytes of one shard object: Zarr v3 ``sharding_indexed``, index at the end, inner codecs [bytes, (blosc,) crc32c].

Without a codec that is nothing but the rows in memory order, four bytes of checksum behind each chunk, and an index of
16 bytes per chunk: the writer hands the staging buffer itself to the kernel and the reader has the kernel fill the
caller's tensor. d_model is never split and a shard's chunks lie in C order, so one context is one contiguous range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc

from shared.basics.documents import typed_at
from shared.store.buffers import Buffer, byte_view
from shared.store.format.checksum import CRC_BYTES, crc32c, crc_bytes

ABSENT = np.uint64(2**64 - 1)  # index entry of a chunk that is not in the shard
BLOSC: dict[str, tuple[Literal["lz4", "zstd"], int]] = {
    "lz4": ("lz4", 5),
    "zstd": ("zstd", 1),
}  # name, level; higher levels cost time and gain nothing
BLOSC_OVERHEAD = 16  # bytes that a compressed chunk may have beyond its own


@cache
def blosc(codec: str, itemsize: int) -> Blosc:
    """The compressor behind codec lz4 or zstd."""
    name, level = BLOSC[codec]
    return Blosc(cname=name, clevel=level, shuffle=Blosc.BITSHUFFLE, typesize=itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayRecord:
    """What a commit record says of one shard object."""

    key: str
    num_bytes: int
    chunk_bytes: npt.NDArray[np.int64]
    """Encoded bytes of each chunk, its checksum included; offsets are their running sum."""
    crc32c: npt.NDArray[np.uint32]
    """The checksum behind each chunk."""

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each chunk starts, and where the last one ends."""
        return np.concatenate([[0], np.cumsum(self.chunk_bytes)])

    def to_json(self) -> dict[str, Any]:
        sizes = self.chunk_bytes.tolist()
        uniform = sizes[0] if len(set(sizes)) == 1 else None
        return {
            "key": self.key,
            "bytes": self.num_bytes,
            "chunk_bytes": sizes if uniform is None else uniform,
            "crc32c": self.crc32c.tolist(),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str = "an array") -> Self:
        """Inverse of `to_json`; raises GranaryError for a value of another type."""
        one_size = isinstance(record, dict) and isinstance(record.get("chunk_bytes"), int)
        crcs = np.array(typed_at(record, "crc32c", list[int], where), np.uint32)
        sizes = np.array(typed_at(record, "chunk_bytes", int if one_size else list[int], where), np.int64)
        key, num_bytes = typed_at(record, "key", str, where), typed_at(record, "bytes", int, where)
        return cls(key, num_bytes, np.broadcast_to(sizes, crcs.shape), crcs)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """One chunk ready to be written."""

    payload: Buffer
    crc: int

    @property
    def num_bytes(self) -> int:
        return memoryview(self.payload).nbytes + CRC_BYTES

    def parts(self) -> tuple[Buffer, Buffer]:
        return self.payload, crc_bytes(self.crc)


def encode_chunks(rows: npt.NDArray[Any], chunk_rows: int, codec: str) -> list[EncodedChunk]:
    """Contiguous `rows` in chunks of `chunk_rows`. Without a codec the payloads are views of `rows`.

    Call it on a thread other than the main one when compressing: there blosc works alone and its output is a pure
    function of its input, while its own thread pool would order the blocks by chance.
    """
    chunks = []
    for start in range(0, len(rows), chunk_rows):
        raw = rows[start : start + chunk_rows]
        payload: Buffer = byte_view(raw) if codec == "none" else blosc(codec, raw.dtype.itemsize).encode(raw)
        chunks.append(EncodedChunk(payload, crc32c(payload)))
    return chunks


def decode_chunk(encoded: Buffer, codec: str, out: npt.NDArray[Any]) -> None:
    """Decompress one payload (without its checksum) into contiguous `out`."""
    blosc(codec, out.dtype.itemsize).decode(encoded, out=out)


def encode_index(chunk_bytes: Sequence[int] | npt.NDArray[np.int64], num_slots: int) -> bytes:
    """Offset and length of each chunk, then of the `num_slots` - n that lie beyond the end of the array; and a crc."""
    index = np.full((num_slots, 2), ABSENT, "<u8")
    sizes = np.asarray(chunk_bytes, np.uint64)
    index[: len(sizes), 0] = np.cumsum(sizes) - sizes
    index[: len(sizes), 1] = sizes
    data = index.tobytes()
    return data + crc_bytes(crc32c(data))


def index_bytes(num_slots: int) -> int:
    """Length of `encode_index`'s result."""
    return 16 * num_slots + CRC_BYTES
