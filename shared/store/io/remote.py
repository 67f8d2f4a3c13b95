"""Object stores: retries, several requests in flight, and puts that never replace, over a client of one's choice.

One object is one PUT with ``If-None-Match: *``, so two writers cannot replace each other's objects as they could with
multipart uploads; several objects and several ranges of an object travel at once. A request that fails for a reason
that may pass (5xx, time-out, refused or dropped connection) is sent again with growing, jittered pauses for
GRANARY_RETRY_SECONDS (300). A put whose answer was lost may find its own object there: callers compare.
"""

import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol, TypeVar

from shared.basics.display import masked
from shared.basics.errors import GranaryError, told_of
from shared.basics.inside import checked_key
from shared.store.buffers import Buffer, byte_view
from shared.store.format.checksum import crc32c
from shared.store.io.base import ObjectMissingError, ObjectShortError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RANGE_BYTES = 8 << 20  # about one GET; smaller costs round trips, larger leaves connections idle
RANGE_THREADS = 16
PARALLEL_PUTS = 4  # objects in flight, each held in memory once
SPARE_BYTES = 16 << 20  # of an object whose memory is kept for the next
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds
PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, EOFError, TypeError, ValueError, GranaryError)


class Client(Protocol):
    """A client of an object store. Besides the errors named, any exception means "try again"."""

    url: str

    def put(self, key: str, data: bytearray, *, replace: bool) -> None:
        """One atomic PUT. Raises FileExistsError, PermissionError, FileNotFoundError (no such bucket)."""

    def fetch(self, key: str, start: int, end: int | None) -> Iterable[Buffer]:
        """Bytes [start, end) or the whole object, in parts as they come; each is valid until the next is asked for.

        Raises FileNotFoundError, EOFError, PermissionError, also while the parts are read.
        """

    def head(self, key: str) -> int:
        """Size in bytes. Raises FileNotFoundError, PermissionError."""

    def find(self, prefix: str) -> dict[str, int]:
        """All keys below a folder and their sizes. Raises PermissionError."""

    def remove(self, key: str) -> None:
        """Delete an object. Raises FileNotFoundError, PermissionError."""


class RemoteIO:
    """`ObjectIO` over a `Client`."""

    parallel_puts = PARALLEL_PUTS

    def __init__(self, client: Client) -> None:
        self.client = client
        self.url = masked(client.url)
        self.retry_seconds = float(os.environ.get("GRANARY_RETRY_SECONDS", "300"))
        self._spare: deque[bytearray] = deque(maxlen=PARALLEL_PUTS)  # fresh pages cost as much as the copy into them
        self._pool = ThreadPoolExecutor(RANGE_THREADS, thread_name_prefix="granary-range")

    def put(self, key: str, parts: Iterable[Buffer], *, replace: bool = False) -> bool:
        if not replace and self.size(key) is not None:
            return False
        data = self._spare.pop() if self._spare else bytearray()
        size = 0
        for part in parts:  # a part is valid only until the next one is asked for
            view = byte_view(part)
            data[size : size + len(view)] = view
            size += len(view)
        del data[size:]
        try:
            self._retry("write", key, lambda: self.client.put(key, data, replace=replace))
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise GranaryError(f"cannot write {self.url}/{key}: no such bucket") from error
        if size >= SPARE_BYTES:
            self._spare.append(data)
        return True

    def get(self, key: str) -> bytes:
        found = bytearray()
        self._fetch(key, 0, None, lambda at, part: found.__setitem__(slice(at, None), part))
        return bytes(found)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        total = sum(len(buffer) for buffer in buffers)
        bounds = cuts(offset, total)

        def read(start: int, end: int) -> None:
            size = self._fetch(key, offset + start, offset + end, lambda at, part: scatter(part, start + at, buffers))
            if size != end - start:
                raise ObjectShortError(
                    f"{key} is shorter than its commit record says: it ends at byte {offset + start + size}"
                )

        if len(bounds) == 2:
            read(0, total)
        else:
            for done in [self._pool.submit(read, *ends) for ends in pairwise(bounds)]:
                done.result()

    def read_checked(self, key: str, offset: int, buffers: Sequence[memoryview]) -> list[int]:
        self.read_into(key, offset, buffers)
        return [crc32c(buffer) for buffer in buffers]

    def size(self, key: str) -> int | None:
        try:
            return self._retry("look at", key, lambda: self.client.head(key))
        except FileNotFoundError:
            return None

    def listing(self, prefix: str = "") -> dict[str, int]:
        return dict(sorted(self._retry("list", prefix, lambda: self.client.find(prefix)).items()))

    def delete(self, key: str) -> None:
        try:
            self._retry("delete", key, lambda: self.client.remove(key))
        except FileNotFoundError:
            return

    def leftovers(self) -> list[str]:
        return []  # an object store shows whole objects only

    def free_bytes(self) -> int | None:
        return None

    def claim(self, *, exclusive: bool) -> bool:
        return True  # object stores have no locks; puts that never replace are what protects there

    def _fetch(self, key: str, start: int, end: int | None, take: Callable[[int, memoryview], None]) -> int:
        """Give `take` each part and where it begins, from the start again after a failure; returns their sum."""

        def request() -> int:
            at = 0
            for part in self.client.fetch(key, start, end):
                view = byte_view(part)
                take(at, view)
                at += len(view)
            return at

        try:
            return self._retry("read", key, request)
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{key} is missing from {self.url}") from error
        except EOFError as error:
            raise ObjectShortError(
                f"{key} is shorter than its commit record says: it ends before byte {end}"
            ) from error

    def _retry(self, verb: str, key: str, request: Callable[[], T]) -> T:
        if key:  # the listing of all has none
            checked_key(key)
        deadline = time.monotonic() + self.retry_seconds
        pause = FIRST_PAUSE
        while True:
            try:
                return request()
            except PermissionError as error:
                raise GranaryError(
                    f"may not {verb} {self.url}/{key}: check the credentials (AWS_ACCESS_KEY_ID, "
                    f"AWS_SECRET_ACCESS_KEY) and the bucket's policy: {told_of(error)}"
                ) from error
            except PERMANENT:
                raise
            except Exception as error:
                if time.monotonic() + pause > deadline:
                    raise GranaryError(
                        f"cannot {verb} {self.url}/{key}: {told_of(error)}: check the network and AWS_ENDPOINT_URL, "
                        "then run the same command again to continue"
                    ) from error
                logger.warning("cannot %s %s/%s, trying again: %s", verb, self.url, key, told_of(error))
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE)


def cuts(offset: int, total: int) -> list[int]:
    """Choose where to cut `total` bytes from `offset` on into requests; 0 and `total` are included.

    At multiples of RANGE_BYTES in the object, which servers keep in stripes of a power of two: a range over one stripe
    more took a sixth longer. No request is for less than an eighth of that, such as a checksum alone.
    """
    inner = range(-offset % RANGE_BYTES, total, RANGE_BYTES)
    return [0, *(cut for cut in inner if RANGE_BYTES // 8 <= cut <= total - RANGE_BYTES // 8), total]


def scatter(data: memoryview, start: int, buffers: Sequence[memoryview]) -> None:
    """Copy `data`, which begins `start` bytes into the concatenation of `buffers`, to where it belongs there."""
    for buffer in buffers:
        if start < len(buffer):
            count = min(len(buffer) - start, len(data))
            buffer[start : start + count] = data[:count]
            data = data[count:]
            start = 0
            if not data:
                return
        else:
            start -= len(buffer)
