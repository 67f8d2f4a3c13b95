"""Names that files give of other files: data from a stranger, which may not lead out of their folder."""

import re
from pathlib import Path

from shared.basics.documents import shortened
from shared.basics.errors import GranaryError

UNFIT = re.compile("[\0\\\\\ud800-\udfff]")  # no separator here, no name there, and halves of characters
LONGEST_PART, LONGEST = 255, 4095


def checked_key(key: object) -> str:
    """`key` itself, a relative path with forward slashes; raises GranaryError for one that leaves where it begins."""
    if not isinstance(key, str) or UNFIT.search(key) or {"", ".", ".."} & set(parts := key.split("/")):
        raise GranaryError(f"{shortened(key)} is not the name of a file below the folder that it is read from")
    if max(map(len, parts)) > LONGEST_PART or len(key) > LONGEST:
        raise GranaryError(f"{shortened(key)} is longer than the name of a file can be")
    return key


def file_in(folder: Path, name: object) -> Path:
    """The file of that name, in `folder` itself; raises GranaryError for a name that says another place.

    A link is followed: what is downloaded from a hub lies in its cache as links.
    """
    if "/" in checked_key(name):
        raise GranaryError(f"{shortened(name)} is not the name of a file in {folder}")
    return folder / str(name)
