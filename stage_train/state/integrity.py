"""Whether a checkpoint is as it was written: digests made while it is, looked at before it is used."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.basics.documents import read_json, typed_at
from shared.basics.errors import GranaryError
from shared.sae.weights_file import Digests, digests_in, header_digest

STATE = "training.json"
DIGESTS = "digests.json"
PICKLED = ".metadata"
"""The index of the layout that torch.distributed.checkpoint has by itself."""


@dataclass(frozen=True)
class TensorsDigest:
    """What a file of tensors is."""

    bytes: int
    header: str
    tensors: Digests


def write_digests(folder: Path, tensors: Mapping[str, TensorsDigest]) -> None:
    """Note what the files of a folder are in it: those of tensors by name, and ``training.json``."""
    files = {STATE: _digest(folder / STATE), **{name: asdict(digest) for name, digest in sorted(tensors.items())}}
    (folder / DIGESTS).write_text(json.dumps({"files": files, "sha256": _digest_of(files)}, indent=1))


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where all is as it was written."""
    if not folder.is_dir():
        return "it is gone"
    if (folder / PICKLED).exists():
        return f"it has a pickle, {PICKLED}, which could run code"
    if not (folder / DIGESTS).is_file():
        return f"it has no {DIGESTS}"
    files = _noted(folder)
    if files is None:
        return f"{DIGESTS} is damaged"
    others = sorted({path.name for path in folder.iterdir()} - {DIGESTS, *files})
    if others:
        return f"{others[0]} is none of its files"
    faults = (_fault_in(folder / name, noted) for name, noted in files.items())
    return next((fault for fault in faults if fault is not None), None)


def state_is_intact(folder: Path) -> bool:
    """Whether ``training.json`` of a checkpoint is as it was written; one without digests is taken as it is."""
    if not (folder / DIGESTS).is_file():
        return True
    files = _noted(folder)
    return files is not None and _fault_in(folder / STATE, files[STATE]) is None


def _noted(folder: Path) -> dict[str, Any] | None:
    """What the digests say of each file; None where they are damaged themselves."""
    try:
        record = read_json(folder / DIGESTS)
        files: dict[str, Any] = typed_at(record, "files", dict[str, Any], DIGESTS)
        return files if record.get("sha256") == _digest_of(files) and STATE in files else None
    except GranaryError:
        return None


def _fault_in(path: Path, noted: Any) -> str | None:
    """What is wrong with a file of a checkpoint."""
    try:
        if path.name == STATE:
            return None if _digest(path) == noted else f"{STATE} is damaged"
        if path.stat().st_size != noted["bytes"]:
            return f"{path.name} has another size than it had"
        with path.open("rb") as file:
            if header_digest(file) != noted["header"]:
                return f"{path.name} is damaged in its header"
            wrong = next((name for name, digest in digests_in(file) if digest != noted["tensors"].get(name)), None)
        return None if wrong is None else f"{path.name} is damaged in {wrong}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{path.name} can't be read ({error})"


def _digest_of(files: Mapping[str, Any]) -> str:
    """SHA-256 of what is noted of the files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> list[int | str]:
    """Size in bytes and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return [path.stat().st_size, digest.hexdigest()]
