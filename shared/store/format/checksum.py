"""CRC-32C (Castagnoli), the checksum of Zarr's ``crc32c`` codec, over any buffer, with the GIL released."""

import numpy as np
from crc32c import crc32c as _crc32c

from shared.store.buffers import Buffer

CRC_BYTES = 4


def crc32c(buffer: Buffer, value: int = 0) -> int:
    """Checksum of `buffer`, continuing from `value`."""
    return _crc32c(buffer, value)


def crc_bytes(value: int) -> bytes:
    """The four little-endian bytes that the codec puts behind a chunk."""
    return value.to_bytes(CRC_BYTES, "little")


def crc_from_bytes(data: Buffer) -> int:
    """Inverse of `crc_bytes`."""
    return int(np.frombuffer(data, "<u4", count=1)[0])
