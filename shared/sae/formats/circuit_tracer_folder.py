"""Reading circuit-tracer 0.5's folders, of transcoders and of cross-layer transcoders: see ``circuit_tracer``.

The tensors keep their place in the files: what is float32 is mapped, and single rows can be read by name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.basics.yaml_file import read_yaml
from shared.sae.formats.circuit_tracer import PLACES
from shared.sae.sites import Sites

SITES = {name: place for place, name in PLACES.items()} | {"hook_mlp_out": "mlp_out"}
KINDS = ("transcoder_set", "cross_layer_transcoder")


def matches(folder: Path) -> bool:
    """Whether the files are circuit-tracer's."""
    files = (folder / "layer_0.safetensors", folder / "W_enc_0.safetensors")
    return (folder / "config.yaml").is_file() and any(file.is_file() for file in files)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where a layer's matrix lies."""

    file: Path
    name: str


@dataclass(frozen=True, slots=True)
class TracerFolder:
    """One folder, as its ``config.yaml`` describes it."""

    folder: Path
    model: str | None
    """Name of the language model."""
    is_clt: bool
    sites: tuple[Sites, ...]
    """By layer."""
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    """By layer: of each tensor in its files."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises GranaryError for a kind or a place that is not known, and for layers with a gap."""
        held = read_yaml(folder / "config.yaml")
        config: Mapping[str, Any] = held if isinstance(held, Mapping) else {}
        kind = config.get("model_kind")
        if kind not in KINDS:
            raise GranaryError(f"{folder}/config.yaml: model_kind={kind!r} is none of {', '.join(KINDS)}")
        places = []
        for key in ("feature_input_hook", "feature_output_hook"):
            if config.get(key) not in SITES:
                known = ", ".join(SITES)
                raise GranaryError(f"{folder}/config.yaml: {key}={config.get(key)!r} is no place known here: {known}")
            places.append(SITES[config[key]])
        is_clt = kind == "cross_layer_transcoder"
        stem = "W_enc" if is_clt else "layer"
        found = (re.fullmatch(rf"{stem}_(\d+)\.safetensors", file.name) for file in folder.iterdir())
        layers = sorted(int(match[1]) for match in found if match)
        if not layers or layers != list(range(len(layers))):
            raise GranaryError(f"{folder} has layers {layers}: circuit-tracer's folders hold all from 0 on")
        sites = tuple(Sites((f"layers.{n}.{places[0]}",), (f"layers.{n}.{places[1]}",)) for n in layers)
        model = config.get("model_name")
        shapes = tuple(_shapes(matrix.file for matrix in _matrices(folder, is_clt, layer)) for layer in layers)
        return cls(folder, model if isinstance(model, str) else None, is_clt, sites, shapes)

    def matrices(self, layer: int) -> tuple[Matrix, Matrix]:
        """Encoder and decoder; a row of a CLT's decoder lies over all layers that it writes."""
        return _matrices(self.folder, self.is_clt, layer)

    def threshold(self, layer: int) -> str:
        """What a layer's encoder file calls the thresholds of its latents."""
        return f"threshold_{layer}" if self.is_clt else "activation_function.threshold"

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """float32, by the names of a group and ``b_dec`` and ``W_skip``; ``threshold`` where latents have one.

        Raises GranaryError for a file that is damaged or lacks a tensor, and for a tensor that is not known.
        """
        end = f"_{layer}" if self.is_clt else ""
        names = {f"{name}{end}": name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        names |= {self.threshold(layer): "threshold"} | ({} if self.is_clt else {"W_skip": "W_skip"})
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(matrix.file for matrix in self.matrices(layer)):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a dict)
                        if name not in names:
                            raise GranaryError(f"{path} holds {name}, which circuit-tracer does not know")
                        found[names[name]] = file.get_tensor(name).float()
            except (OSError, SafetensorError) as error:
                raise GranaryError(f"{path} is not there, or damaged: {error}") from None
        missing = {"W_enc", "b_enc", "W_dec", "b_dec"} - found.keys()
        if missing:
            raise GranaryError(f"{self.folder} lacks {', '.join(sorted(missing))} of layer {layer}")
        found["W_dec"] = found["W_dec"].flatten(1)
        if "threshold" in found:
            found["threshold"] = found["threshold"].expand(len(found["b_enc"])).contiguous()
            if not bool((found["threshold"] >= 0).all()):
                raise GranaryError(f"{self.folder} has thresholds below 0 in layer {layer}, which are not known here")
        return found

    def shape(self, layer: int) -> tuple[int, int, int]:
        """(latents, width read, width of a decoder row) of a layer."""
        names = [matrix.name for matrix in self.matrices(layer)]
        encoder, decoder = (self.shapes[layer].get(name, ()) for name in names)
        if len(encoder) != 2 or len(decoder) not in (2, 3) or encoder[0] != decoder[0]:
            raise GranaryError(f"{self.folder}: W_enc {encoder} and W_dec {decoder} of layer {layer} do not fit")
        return encoder[0], encoder[1], prod(decoder[1:])

    def has(self, layer: int, name: str) -> bool:
        """Whether a layer's files hold this tensor."""
        return name in self.shapes[layer]


def _matrices(folder: Path, is_clt: bool, layer: int) -> tuple[Matrix, Matrix]:
    if not is_clt:
        file = folder / f"layer_{layer}.safetensors"
        return Matrix(file, "W_enc"), Matrix(file, "W_dec")
    encoder, decoder = (
        Matrix(folder / f"{name}_{layer}.safetensors", f"{name}_{layer}") for name in ("W_enc", "W_dec")
    )
    return encoder, decoder


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Of all tensors in some files, from their headers; raises GranaryError for a file that is damaged."""
    found: dict[str, tuple[int, ...]] = {}
    for path in dict.fromkeys(files):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise GranaryError(f"{path} is not there, or damaged: {error}") from None
    return found
