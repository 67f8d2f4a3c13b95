"""Parts of the pass on disk: one object each, put whole or not at all, read by blocks of latents.

A part lasts until the folder is finished. Another process, or the same after a kill, takes what is there and does what
is missing. Parts of other inputs are told by their identity.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numcodecs.zstd import Zstd
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.basics.errors import GranaryError
from shared.store.format.checksum import crc32c
from shared.store.format.manifest import DamagedObjectError, seal, unseal
from shared.store.io.base import ObjectIO
from stage_inspect.scan.log import Columns

FOLDER = "parts"
LENGTH_BYTES = 8
CODEC = Zstd(level=1)


def part_key(number: int) -> str:
    """Key of the part of a number."""
    return f"{FOLDER}/{number:06d}.part"


def merged_key(block: int) -> str:
    """Key of a block of latents whose parts are merged."""
    return f"{FOLDER}/{block:06d}.merged"


def write(io: ObjectIO, key: str, identity: str, pieces: list[Columns], *, replace: bool = False) -> None:
    """Put pieces of columns; an object that is there already stays, unless to `replace` it."""
    io.put(key, _encoded(identity, pieces), replace=replace)


@dataclass(frozen=True)
class PartFile:
    """An object that `write` put."""

    io: ObjectIO
    key: str
    sizes: list[int]
    crc32c: list[int]

    @classmethod
    def open(cls, io: ObjectIO, key: str, identity: str) -> "PartFile | None":
        """None where there is no such object; raises GranaryError for one that is damaged or of other inputs."""
        size = io.size(key)
        if size is None:
            return None
        try:
            tail = _read(io, key, size - LENGTH_BYTES, LENGTH_BYTES)
            length = int.from_bytes(tail, "little")
            trailer = unseal(_read(io, key, size - LENGTH_BYTES - length, length), key)
        except (DamagedObjectError, ValueError, OverflowError, MemoryError):
            raise GranaryError(f"{io.url}/{key} is damaged: delete it, then run the same command again") from None
        if trailer["identity"] != identity:
            raise GranaryError(
                f"{io.url} holds the unfinished latents of another dictionary, store or settings: choose another"
                " latents.url, or give latents.overwrite=true"
            )
        return cls(io, key, trailer["sizes"], trailer["crc32c"])

    def piece(self, number: int) -> Columns:
        """One piece's columns."""
        data = _read(self.io, self.key, sum(self.sizes[:number]), self.sizes[number])
        try:
            if crc32c(data) == self.crc32c[number]:
                return dict(load(bytes(CODEC.decode(data))))
        except (SafetensorError, RuntimeError):
            pass
        raise GranaryError(f"{self.io.url}/{self.key} is damaged: delete it, then run the same command again")

    def __len__(self) -> int:
        return len(self.sizes)


def numbers_of(io: ObjectIO) -> list[int]:
    """Numbers of the parts that are there, ascending."""
    names = (key.rpartition("/")[2] for key in io.listing(FOLDER))
    return sorted(int(name.removesuffix(".part")) for name in names if name.endswith(".part"))


def remove(io: ObjectIO) -> None:
    """Delete all parts, and what writers that no longer live have left beside them."""
    for key in [*io.listing(FOLDER), *io.leftovers()]:
        io.delete(key)


def _encoded(identity: str, pieces: list[Columns]) -> Iterator[bytes]:
    """The bytes of an object: its pieces, made one at a time as they are written, and what tells of them."""
    sizes, checksums = [], []
    for columns in pieces:
        piece = bytes(CODEC.encode(save({name: np.ascontiguousarray(c) for name, c in columns.items()})))
        sizes.append(len(piece))
        checksums.append(crc32c(piece))
        yield piece
    trailer = seal({"identity": identity, "sizes": sizes, "crc32c": checksums})
    yield trailer
    yield len(trailer).to_bytes(LENGTH_BYTES, "little")


def _read(io: ObjectIO, key: str, start: int, length: int) -> bytes:
    if start < 0 or length < 0:
        raise ValueError(key)
    data = bytearray(length)
    io.read_into(key, start, [memoryview(data)])
    return bytes(data)
