"""A disk that is full or can't be written is one line, wherever it is met."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.basics.errors import GranaryError

FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EMFILE, errno.ENFILE,
}  # fmt: skip


# How safetensors and torch, which write files themselves, say it.
OS_ERROR = re.compile(r"\(os error (\d+)\)")
# What SQLite says for it: no room, read-only, input or output failed, a file that can't be opened.
SQLITE = {13: errno.ENOSPC, 8: errno.EROFS, 10: errno.EIO, 14: errno.EACCES}
TORCH_FAILED = re.compile(r"PytorchStreamWriter failed writing|iostream error")


def disk_fault(error: BaseException) -> OSError | None:
    """`error` as that of a disk (full, read-only, broken, not permitted, no such place possible); None for others."""
    if isinstance(error, OSError):
        return error if error.errno in FAULTS else None
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        return OSError(SQLITE[code & 0xFF], str(error)) if code & 0xFF in SQLITE else None
    found = OS_ERROR.search(str(error))
    number = int(found[1]) if found else errno.EIO if TORCH_FAILED.search(str(error)) else None
    return OSError(number, os.strerror(number)) if number in FAULTS else None


@contextmanager
def telling_disk_errors(where: Path | None = None) -> Iterator[None]:
    """Turn the errors of a disk into GranaryError naming the file, or else `where`; others pass."""
    try:
        yield
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        if fault.filename is None and where is not None:
            fault.filename = str(where)
        raise GranaryError(describe(fault)) from error


def describe(error: OSError) -> str:
    """One line that names the file, where it is known, and says how to go on."""
    where = error.filename or "the output"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{where} can't be opened ({error.strerror}): raise ulimit -n, then run the same command again"
    what = "written" if error.errno not in (errno.EACCES, errno.EPERM, errno.EIO) else "read or written"
    return (
        f"{where} can't be {what} ({error.strerror}): make room there, or choose another folder; what was saved "
        "before is intact, and the same command goes on from it"
    )
