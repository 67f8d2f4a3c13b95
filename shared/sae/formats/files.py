"""Reading other projects' folders: JSON, one or several safetensors files, and clear errors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from shared.basics.errors import GranaryError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises GranaryError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GranaryError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise GranaryError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise GranaryError(f"{path} does not hold a JSON object")
    return content


def read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All tensors of ``<name>.safetensors``, or of the files that ``<name>.safetensors.index.json`` lists; float32."""
    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    else:
        files = [f"{name}.safetensors"]
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise GranaryError(f"{folder} has no {file}")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as error:
            raise GranaryError(f"{folder / file} is damaged: {error}") from None
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def take(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], where: Path) -> list[torch.Tensor]:
    """The named tensors in order; raises GranaryError for one that is missing or of another shape."""
    taken = []
    for name, shape in shapes.items():
        if name not in tensors:
            raise GranaryError(f"{where} lacks the tensor {name}")
        if tuple(tensors[name].shape) != shape:
            raise GranaryError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, not {shape}")
        taken.append(tensors[name])
    return taken
