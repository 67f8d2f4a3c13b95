"""Dictionaries in folders, one opened at a time, and single rows of their matrices from the files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.basics.run_folder import WEIGHTS_FILE
from shared.sae import tracer_sets
from shared.sae.config import DictionaryConfig
from shared.sae.finding import expand
from shared.sae.folder import describe, locate
from shared.sae.for_store import check_whole
from shared.sae.formats.circuit_tracer_folder import TracerFolder, matches
from shared.sae.loading import KINDS, load
from shared.sae.rows_file import RowsFile
from shared.sae.variants import Dictionary


@dataclass(frozen=True, slots=True)
class FileRows:
    """Rows of a group's matrices in their files."""

    encoders: RowsFile
    W_enc: str
    decoders: RowsFile
    W_dec: str

    def encoder(self, latents: Tensor) -> Tensor:
        """Read from the file."""
        return self.encoders.rows(self.W_enc, latents)

    def decoder(self, latents: Tensor, columns: slice) -> Tensor:
        """Read from the file."""
        return self.decoders.rows(self.W_dec, latents, columns)


@dataclass(frozen=True, slots=True)
class Member:
    """A dictionary that is on disk."""

    name: str
    config: DictionaryConfig
    model: Mapping[str, Any]
    """What it records of the language model that it was taught."""
    open: Callable[[], Dictionary]
    """Read, or mapped where it stays on the CPU."""
    rows: Callable[[], list[FileRows] | None]
    """Of each group; None where its matrices are made of others, as tied decoders are."""


def members(spec: str | Path, device: str | torch.device = "cpu") -> list[Member]:
    """What a folder, a folder of folders, a glob, a hub id, or a folder of circuit-tracer's holds; none is loaded yet.

    Raises GranaryError where there is no whole dictionary.
    """
    if matches(Path(spec)):
        return of_circuit_tracer(Path(spec), device)
    found = []
    for name in expand(str(spec)):
        folder = locate(name)
        check_whole(name, folder)
        description = describe(folder)
        config, taught = description.config(KINDS), description.provenance.get("model") or {}
        rows = partial(_rows_of, folder, config.num_groups)
        found.append(Member(name, config, taught, _Opened(folder, device), rows))
    return found


def of_circuit_tracer(path: Path, device: str | torch.device = "cpu") -> list[Member]:
    """The transcoder of each layer, or the CLT, of a folder in circuit-tracer's format."""
    folder = TracerFolder.open(path)
    taught = {} if folder.model is None else {"id": folder.model}

    def rows(layers: Sequence[int]) -> list[FileRows]:
        pairs = map(folder.matrices, layers)
        return [FileRows(RowsFile(one.file), one.name, RowsFile(other.file), other.name) for one, other in pairs]

    def layer_of(layer: int) -> Dictionary:
        return tracer_sets.transcoder(folder, made[layer], layer).to(device)

    made = tracer_sets.configs(folder)
    if folder.is_clt:
        (config,) = made
        every = range(len(folder.sites))
        return [
            Member(
                str(path), config, taught, lambda: tracer_sets.clt(folder, config).to(device), partial(rows, every)
            )
        ]  # fmt: skip
    return [
        Member(f"{path}/layer_{n}", config, taught, partial(layer_of, n), partial(rows, [n]))
        for n, config in enumerate(made)
    ]


@dataclass(slots=True, eq=False)
class _Opened:
    """Opens a folder of this project; the weights are compared with their digests the first time."""

    folder: Path
    device: str | torch.device
    is_checked: bool = False

    def __call__(self) -> Dictionary:
        made = load(self.folder, device=self.device, verify=False if self.is_checked else None)
        self.is_checked = True
        return made


def _rows_of(folder: Path, num_groups: int) -> list[FileRows] | None:
    file = RowsFile(folder / WEIGHTS_FILE)
    prefixes = [""] if "W_enc" in file else [f"layers.{number}." for number in range(num_groups)]
    if f"{prefixes[0]}W_dec" not in file:
        return None
    return [FileRows(file, f"{prefix}W_enc", file, f"{prefix}W_dec") for prefix in prefixes]
