"""Objects in a local folder.

Written to a temporary file beside its place, fsync, link, fsync of the folder; read by preadv into the caller's memory.
"""

import ctypes
import errno
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.basics.display import masked
from shared.basics.errors import GranaryError
from shared.basics.files import is_abandoned, is_temporary, lock, make_folders, open_alone, sync_folder, temporary
from shared.basics.inside import checked_key
from shared.store.buffers import Buffer, byte_view
from shared.store.format.checksum import crc32c
from shared.store.io.base import BusyObjectError, ObjectMissingError, ObjectShortError

MAX_BUFFERS = 512  # per preadv; the kernel's limit is 1024
# Read, then checksummed. Smaller pieces are still in the core's cache then, but make threads take the interpreter from
# each other: on two threads 0.61 of a memmap copy with 8 MiB, 0.37 with 1 MiB.
PIECE_BYTES = 8 << 20
WRITEBACK_BYTES = 32 << 20  # written between two hints to the disk
SYNC_FILE_RANGE_WRITE = 2


class LocalIO:
    """`ObjectIO` over a folder."""

    parallel_puts = 1

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = masked(str(self.root))
        self._claim: int | None = None

    def put(self, key: str, parts: Iterable[Buffer], *, replace: bool = False) -> bool:
        final = self._place(key, changes=True)
        temp = temporary(final)
        with explained(self.url, key, "write"):
            make_folders(final.parent)
            fd = open_alone(temp)
            if fd is None:
                raise BusyObjectError(
                    f"another process is writing {key} of this store: let it finish or stop it, then run this again"
                )
            try:
                unsent = 0
                for part in parts:
                    view = byte_view(part)
                    _write_all(fd, view)
                    unsent += len(view)
                    if unsent >= WRITEBACK_BYTES:
                        start_writeback(fd)
                        unsent = 0
                os.fsync(fd)
                stored = _publish(temp, final, replace)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temp)
                os.close(fd)  # gives up the lock, so last
            sync_folder(final.parent)
        return stored

    def get(self, key: str) -> bytes:
        with explained(self.url, key, "read"), open(self._open(key), "rb") as file:
            return file.read()

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        with explained(self.url, key, "read"):
            fd = self._open(key)
            try:
                for start in range(0, len(buffers), MAX_BUFFERS):
                    offset = _read_all(fd, offset, list(buffers[start : start + MAX_BUFFERS]), key)
            finally:
                os.close(fd)

    def read_checked(self, key: str, offset: int, buffers: Sequence[memoryview]) -> list[int]:
        crcs = [0] * len(buffers)
        with explained(self.url, key, "read"):
            fd = self._open(key)
            try:
                for pieces in in_pieces(buffers, PIECE_BYTES):
                    offset = _read_all(fd, offset, [piece for _, piece in pieces], key)
                    for number, piece in pieces:
                        crcs[number] = crc32c(piece, crcs[number])
            finally:
                os.close(fd)
        return crcs

    def size(self, key: str) -> int | None:
        try:
            return self._place(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def listing(self, prefix: str = "") -> dict[str, int]:
        return {key: size for key, size in self._walk(prefix) if not _is_temporary(key)}

    def delete(self, key: str) -> None:
        path = self._place(key, changes=True)
        with explained(self.url, key, "delete"), suppress(FileNotFoundError):
            os.unlink(path)
            sync_folder(path.parent)

    def leftovers(self) -> list[str]:
        return [key for key, _ in self._walk("") if _is_temporary(key) and is_abandoned(self.root / key)]

    def free_bytes(self) -> int | None:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def claim(self, *, exclusive: bool) -> bool:
        if self._claim is None:
            with explained(self.url, "", "open"):
                self._claim = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._claim)
        return lock(self._claim, exclusive=exclusive)

    def _place(self, key: str, *, changes: bool = False) -> Path:
        """Where an object lies. What `changes` one must not do it through a link to elsewhere."""
        path = self.root / checked_key(key)
        if changes and not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise GranaryError(f"{self.url}/{key} lies behind a link out of the store: nothing is changed there")
        return path

    def _open(self, key: str) -> int:
        """For reading; a pipe in place of a file reads as an empty one, where it would be waited for."""
        return os.open(self._place(key), os.O_RDONLY | os.O_NONBLOCK)

    def _walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        pending = [self.root / prefix if prefix else self.root]
        while pending:
            folder = pending.pop()
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                else:
                    with suppress(FileNotFoundError):
                        yield os.path.relpath(entry.path, self.root), entry.stat().st_size


@contextmanager
def explained(url: str, key: str, verb: str) -> Iterator[None]:
    """Turn what the operating system says into the one line a user can act on."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissingError(f"{key} is missing from {url}") from error
    except OSError as error:
        where = f"{url}/{key}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GranaryError(
                f"no space left to {verb} {where}: free some, then run the same command again to continue"
            ) from error
        if error.errno == errno.EFBIG:
            raise GranaryError(
                f"{where} exceeds the file size limit of this process (ulimit -f): raise it or lower "
                "store.shard_contexts, then run the same command again"
            ) from error
        raise GranaryError(f"cannot {verb} {where}: {error.strerror or error}") from error


def in_pieces(buffers: Sequence[memoryview], size: int) -> Iterator[list[tuple[int, memoryview]]]:
    """(number of its buffer, view) for consecutive bytes of `buffers`, in lists of at most `size` bytes."""
    pieces: list[tuple[int, memoryview]] = []
    room = size
    for number, buffer in enumerate(buffers):
        while buffer:
            pieces.append((number, buffer[:room]))
            room -= len(pieces[-1][1])
            buffer = buffer[len(pieces[-1][1]) :]
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _write_all(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def start_writeback(fd: int) -> None:
    """Let the disk begin with what was written so far while the next bytes are made; fsync then has little left to do.

    A hint: where the system has no sync_file_range, fsync does it all.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE)


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    found: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_sync_file_range = _find_sync_file_range()


def _read_all(fd: int, offset: int, views: list[memoryview], key: str) -> int:
    """preadv until every view is full; returns the offset behind the last byte."""
    while views:
        got = os.preadv(fd, views, offset)
        if got == 0:
            raise ObjectShortError(f"{key} is shorter than its commit record says: it ends at byte {offset}")
        offset += got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if views and got:
            views[0] = views[0][got:]
    return offset


def _publish(temp: Path, final: Path, replace: bool) -> bool:
    if replace:
        os.replace(temp, final)
        return True
    try:
        os.link(temp, final)  # unlike a rename, fails where the name exists
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        if final.exists():  # a file system without hard links: the check and the rename are two steps there
            return False
        os.replace(temp, final)
    return True


def _is_temporary(key: str) -> bool:
    return is_temporary(key.rpartition("/")[2])
