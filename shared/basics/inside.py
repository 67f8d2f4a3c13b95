"""Names that files give of other files: data from a stranger, which may not lead out of their folder."""

from pathlib import Path

from shared.basics.errors import GranaryError


def checked_key(key: object) -> str:
    """`key` itself, a relative path with forward slashes; raises GranaryError for one that leaves where it begins."""
    if not isinstance(key, str) or "\0" in key or "\\" in key or {"", ".", ".."} & set(key.split("/")):
        raise GranaryError(f"{key!r} is not the name of a file below the folder that it is read from")
    return key


def file_in(folder: Path, name: object) -> Path:
    """The file of that name, in `folder` itself; raises GranaryError for a name that says another place.

    A link is followed: what is downloaded from a hub lies in its cache as links.
    """
    if "/" in checked_key(name):
        raise GranaryError(f"{name!r} is not the name of a file in {folder}")
    return folder / str(name)
