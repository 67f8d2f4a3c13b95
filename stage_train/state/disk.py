"""A disk that is full or can't be written is one line, wherever in training it is met."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from shared.basics.errors import GranaryError

FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def telling_disk_errors() -> Iterator[None]:
    """Turn the errors of a disk into GranaryError naming the file; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FAULTS:
            raise
        where = error.filename or "a file of the run"
        raise GranaryError(
            f"{where} can't be written ({error.strerror}): make room or give another out_dir; what was saved is intact "
            "and the same command continues"
        ) from error
