"""Objects in a local folder.

Written to a temporary file beside its place, fsync, link, fsync of the folder; read by preadv into the caller's memory.
"""

import ctypes
import errno
import fcntl
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
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
        self.url = str(self.root)
        self._claim: int | None = None

    def put(self, key: str, parts: Iterable[Buffer], *, replace: bool = False) -> bool:
        final = self.root / key
        temp = final.with_name(f".{final.name}.tmp")
        with explained(self.url, key, "write"):
            _make_folders(final.parent)
            fd = _open_exclusively(temp, key)
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
            _sync_folder(final.parent)
        return stored

    def get(self, key: str) -> bytes:
        with explained(self.url, key, "read"):
            return (self.root / key).read_bytes()

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        with explained(self.url, key, "read"):
            fd = os.open(self.root / key, os.O_RDONLY)
            try:
                for start in range(0, len(buffers), MAX_BUFFERS):
                    offset = _read_all(fd, offset, list(buffers[start : start + MAX_BUFFERS]), key)
            finally:
                os.close(fd)

    def read_checked(self, key: str, offset: int, buffers: Sequence[memoryview]) -> list[int]:
        crcs = [0] * len(buffers)
        with explained(self.url, key, "read"):
            fd = os.open(self.root / key, os.O_RDONLY)
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
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def listing(self, prefix: str = "") -> dict[str, int]:
        return {key: size for key, size in self._walk(prefix) if not _is_temp(key)}

    def delete(self, key: str) -> None:
        with explained(self.url, key, "delete"), suppress(FileNotFoundError):
            os.unlink(self.root / key)
            _sync_folder((self.root / key).parent)

    def leftovers(self) -> list[str]:
        return [key for key, _ in self._walk("") if _is_temp(key) and _is_abandoned(self.root / key)]

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
        return _lock(self._claim, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)

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


def _open_exclusively(temp: Path, key: str) -> int:
    """Open the one temporary file of a key, empty; raises BusyObjectError while another live writer has it.

    The name is fixed and the claim is a file lock, which the kernel drops with its process: what a killed writer left
    is taken over by the next one, and two writers can't mix their bytes.
    """
    while True:
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _lock(fd):
            os.close(fd)
            raise BusyObjectError(
                f"another process is writing {key} of this store: let it finish or stop it, then run this again"
            )
        status = os.fstat(fd)
        with suppress(FileNotFoundError):
            if os.stat(temp).st_ino == status.st_ino and status.st_nlink == 1:
                os.ftruncate(fd, 0)
                return fd
            if status.st_nlink > 1:  # its writer died between link and unlink: that inode is the published object
                os.unlink(temp)
        os.close(fd)


def _lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """False where another open file holds it; True too where the file system has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
    return True


def _is_temp(key: str) -> bool:
    name = key.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


def _is_abandoned(temp: Path) -> bool:
    """True where no living process holds the lock; False where the file system has no locks to tell by."""
    try:
        fd = os.open(temp, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _make_folders(folder: Path) -> None:
    """mkdir -p whose new names survive a power cut."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
