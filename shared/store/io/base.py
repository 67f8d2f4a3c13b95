"""What storage is, wherever it lies: whole objects in, whole objects or ranges out, and the errors of that.

An object appears under its key at once and whole, or not at all, and is not replaced by a second `put`. That is what
the commit protocol rests on.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from shared.basics.errors import GranaryError
from shared.store.buffers import Buffer


class ObjectMissingError(GranaryError):
    """No object under that key."""


class ObjectShortError(GranaryError):
    """An object ends before the bytes that were asked for."""


class BusyObjectError(GranaryError):
    """Another live process is writing the object."""


class ObjectIO(Protocol):
    """Storage under one URL; keys are relative paths with forward slashes. Safe to use from several threads."""

    url: str
    parallel_puts: int
    """Objects worth writing at once."""

    def put(self, key: str, parts: Iterable[Buffer], *, replace: bool = False) -> bool:
        """Store the concatenated `parts` atomically; False, and nothing changed, where the key exists already.

        A part is looked at only until the next one is asked for, so the producer may use its memory again then.
        """

    def get(self, key: str) -> bytes:
        """A whole (small) object; raises ObjectMissingError."""

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` from consecutive bytes at `offset`; raises ObjectMissingError or ObjectShortError."""

    def read_checked(self, key: str, offset: int, buffers: Sequence[memoryview]) -> list[int]:
        """`read_into`, and the crc32c of each buffer."""

    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""

    def listing(self, prefix: str = "") -> dict[str, int]:
        """Every key below the folder `prefix`, with its size in bytes; unfinished objects left out."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def leftovers(self) -> list[str]:
        """Unfinished objects of writers that no longer live."""

    def free_bytes(self) -> int | None:
        """Room left, None where that has no meaning."""

    def claim(self, *, exclusive: bool) -> bool:
        """Hold the URL for the life of this object: many writers, or one that removes things; False where refused."""
