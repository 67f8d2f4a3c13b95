"""Is an object still what its record says? Used by verify, and by a writer that finds its key taken."""

import bisect
import hashlib

import numpy as np

from shared.basics.errors import GranaryError
from shared.store.format.checksum import CRC_BYTES, crc32c, crc_from_bytes
from shared.store.format.shard import ArrayRecord, encode_index
from shared.store.io.base import ObjectIO, ObjectMissingError

READ_BYTES = 8 << 20


def check_array_object(io: ObjectIO, record: ArrayRecord, num_slots: int | None) -> str | None:
    """Re-read a whole object; None where every bit is as recorded, else what is wrong with it.

    `num_slots` is the number of entries in the shard's index, None for a plain chunk, which has no index.
    """
    index = b"" if num_slots is None else encode_index(record.chunk_bytes, num_slots)
    size = io.size(record.key)
    if size is None:
        return "is missing"
    if size != record.num_bytes:
        return f"has {size} bytes instead of {record.num_bytes}"
    largest = int(record.chunk_bytes.max(initial=0))
    buffer = memoryview(bytearray(min(max(largest, READ_BYTES), size)))
    ends = np.cumsum(record.chunk_bytes).tolist()
    try:
        number = start = 0
        while number < len(ends):
            # As many chunks as a read may hold, at least one: small ones are not asked for one by one.
            stop = max(bisect.bisect_right(ends, start + READ_BYTES), number + 1)
            io.read_into(record.key, start, [buffer[: ends[stop - 1] - start]])
            position = 0
            for end, recorded in zip(ends[number:stop], record.crc32c[number:stop].tolist(), strict=True):
                chunk = buffer[position : end - start]
                crc = crc_from_bytes(chunk[-CRC_BYTES:])
                if crc != recorded or crc32c(chunk[:-CRC_BYTES]) != crc:
                    return f"fails its checksum in chunk {number}"
                number, position = number + 1, end - start
            start = ends[stop - 1]
        found = bytearray(len(index))
        if index:
            io.read_into(record.key, size - len(index), [memoryview(found)])
            if bytes(found) != index:
                return "has a damaged shard index"
    except ObjectMissingError:
        return "is missing"
    except GranaryError as error:
        return f"cannot be read: {error}"
    return None


def object_sha256(io: ObjectIO, key: str, size: int) -> str:
    """Hexadecimal SHA-256 of a whole object of known size.

    Not a crc32c: that of bytes which end in their own crc32c, as every chunk does, is the same whatever the bytes.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(READ_BYTES, size)))
    for offset in range(0, size, READ_BYTES):
        piece = buffer[: min(READ_BYTES, size - offset)]
        io.read_into(key, offset, [piece])
        digest.update(piece)
    return digest.hexdigest()
