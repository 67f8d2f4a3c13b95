"""Reading other projects' folders: JSON, one or several safetensors files, and clear errors."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.basics.documents import read_json, typed_at
from shared.basics.errors import GranaryError
from shared.basics.inside import file_in

# How many times its size a packed file of weights may unpack to, beyond what is small anyway.
MOST_UNPACKED = 20
SMALL_BYTES = 1 << 20


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All tensors of ``<name>.safetensors``, or of the files that ``<name>.safetensors.index.json`` lists."""
    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        listed = typed_at(read_json(index), "weight_map", dict[str, str], index)
        files = sorted(set(listed.values()))
    else:
        files = [f"{name}.safetensors".rpartition("/")[2]]
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        path = file_in((folder / name).parent, file)
        if not path.is_file():
            raise GranaryError(f"{folder} has no {file}")
        tensors |= read_safetensors(path)
    return tensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; raises GranaryError where it is damaged, or none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise GranaryError(f"{path} is damaged, or no safetensors file: {error}") from None


def read_pickled(path: Path, offset: int = 0) -> dict[str, Any]:
    """What torch saved of a dictionary, read by torch's reader of tensors alone: no other code of the file runs.

    `offset` is where in the file it begins. Raises GranaryError for anything else than tensors and plain values in it.
    """
    try:
        check_unpacked(path)
        with warnings.catch_warnings(action="ignore"), path.open("rb") as file:  # of a pickle that torch did not write
            file.seek(offset)
            found = torch.load(io.BytesIO(file.read()) if offset else file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise GranaryError(f"{path} can't be read as tensors: {told}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise GranaryError(f"{path} holds no dictionary of tensors")
    return found


def check_unpacked(path: Path) -> None:
    """Raise GranaryError for a packed file that holds far more than its size: weights don't get smaller by packing."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MOST_UNPACKED * path.stat().st_size + SMALL_BYTES:
        raise GranaryError(f"{path} would unpack to {unpacked:,} bytes: these are no weights")
