"""Files and folders that are whole or not there, also after a power cut; locks that die with their process.

A file is written beside its place under one fixed name, flushed to disk, renamed, and the folder flushed. The writer
holds a lock on it meanwhile, which the kernel drops with its process: two writers of one file take turns, and what a
killed one left is taken over by the next.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write; when the block ends its content is `path`'s, on disk, in place of what was there.

    After an error in the block, or a full disk, `path` is as before. Folders are made as needed. Raises OSError.
    """
    make_folders(path.parent)
    temp = temporary(path)
    fd = open_alone(temp, wait=True)
    assert fd is not None
    with os.fdopen(fd, "wb") as file:  # gives up the lock when it is closed, so last
        try:
            yield file
            file.flush()
            os.fsync(fd)
            os.replace(temp, path)
        except BaseException as error:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            with suppress(OSError):
                file.close()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # a failed write does not say where
            raise
    sync_folder(path.parent)


def write_together(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files that belong to one another: no former one is ever beside a new one.

    The former ones stay until the contents of all are on disk, then all go, the first last, and the new ones take their
    places. A disk that breaks meanwhile leaves some of one or some of the other.
    """
    with ExitStack() as stack:
        for name, text in texts.items():
            file = stack.enter_context(replacing(folder / name))
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        for name in reversed(list(texts)):
            (folder / name).unlink(missing_ok=True)


@contextmanager
def making_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill beside `folder`; when the block ends it is `folder`, on disk, where nothing or no file was.

    With `replace` it takes the place of a folder that is there. After an error in the block, or a full disk, nothing of
    it is left, and what was there is. Where a disk fails after all is in its place, and lets nothing be taken back
    either, the folder stays and that is no error. Raises OSError.
    """
    final = Path(os.path.realpath(folder))
    make_folders(final.parent)
    temp, former = temporary(final), temporary(final.with_name(f"{final.name}.former"))
    if former.exists() and not final.exists():  # its writer died between two renames
        os.replace(former, final)
    for left in (temp, former):
        shutil.rmtree(left, ignore_errors=True)
    temp.mkdir()
    try:
        yield temp
        for path in temp.rglob("*"):
            _flush(path)
        sync_folder(temp)
        if replace and final.exists():
            os.replace(final, former)
        os.replace(temp, final)
        try:
            sync_folder(final.parent)
        except OSError:
            if _taken_back(final, temp):
                raise
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        with suppress(OSError):
            os.replace(former, final)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _taken_back(final: Path, temp: Path) -> bool:
    """Whether `final` could be renamed back to `temp`; removed where it is, it might go by half."""
    try:
        os.replace(final, temp)
    except OSError:
        return False
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Make `content` the whole file, as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def temporary(path: Path) -> Path:
    """Give the place where a file lies while it is written."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file of that name is one that is being written, or was when its writer died."""
    return name.startswith(".") and name.endswith(".tmp")


def is_abandoned(temp: Path) -> bool:
    """Whether no living process holds the lock of a file or folder; False without locks on the file system."""
    try:
        fd = os.open(temp, os.O_RDONLY if temp.is_dir() else os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def open_alone(temp: Path, *, wait: bool = False) -> int | None:
    """Open the one temporary file of a name, empty and locked; None while another writer has it, unless to `wait`."""
    while True:
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not lock(fd, wait=wait):
                os.close(fd)
                return None
            status = os.fstat(fd)
            with suppress(FileNotFoundError):
                if os.stat(temp).st_ino == status.st_ino and status.st_nlink == 1:
                    os.ftruncate(fd, 0)
                    return fd
                if status.st_nlink > 1:  # its writer died between link and unlink: that inode is the published object
                    os.unlink(temp)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def lock(fd: int, *, exclusive: bool = True, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed or its process ends; False where another one holds it.

    True too where the file system has no locks. A lock of this open file that exists is changed to the kind asked for.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    return True


def lock_folder(folder: Path) -> int | None:
    """Hold a folder until the descriptor returned is closed or the process ends; None where another one holds it.

    Raises OSError where there is no such folder.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if lock(fd):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def make_folders(folder: Path) -> None:
    """mkdir -p whose new names survive a power cut."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    _flush(folder, os.O_DIRECTORY)


def _flush(path: Path, kind: int = 0) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    fd = os.open(path, os.O_RDONLY | kind)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
