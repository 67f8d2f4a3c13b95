"""Whether a checkpoint is as it was written: digests of its files, made when it is, looked at before it is used."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGESTS = "digests.json"


def write_digests(folder: Path) -> None:
    """Note the size and SHA-256 of every file of a folder in it."""
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != DIGESTS}
    (folder / DIGESTS).write_text(json.dumps({"files": files, "sha256": _digest_of(files)}, indent=1))


def fault_of(folder: Path) -> str | None:
    """What is wrong with a folder, in a few words; None where all is as it was written.

    A folder without digests, from before there were any, is taken as it is.
    """
    if not folder.is_dir():
        return "it is gone"
    noted = folder / DIGESTS
    if not noted.is_file():
        return None
    try:
        record = json.loads(noted.read_bytes())
        files = dict(record["files"])
        intact = record["sha256"] == _digest_of(files)
    except (OSError, ValueError, TypeError, KeyError):
        intact = False
    if not intact:
        return f"{DIGESTS} is damaged"
    for name, wanted in files.items():
        path = folder / Path(name).name
        try:
            if _digest(path) != wanted:
                return f"{path.name} is damaged"
        except OSError:
            return f"{path.name} can't be read"
    return None


def _digest_of(files: Mapping[str, Any]) -> str:
    """SHA-256 of what is noted of the files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> list[int | str]:
    """Size in bytes and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return [path.stat().st_size, digest.hexdigest()]
