"""Which dictionaries a graph is made of, and whether they were taught the model that it is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.basics.run_folder import WEIGHTS_FILE
from shared.sae import tracer_sets
from shared.sae.finding import expand
from shared.sae.folder import describe, locate
from shared.sae.for_store import check_whole
from shared.sae.formats.circuit_tracer_folder import TracerFolder, matches
from shared.sae.loading import KINDS, load
from shared.sae.rows_file import RowsFile
from shared.sae.variants import Dictionary
from stage_trace.group_weights import GroupRows
from stage_trace.replacement import places_of
from stage_trace.session import Source, held_rows


def find_sources(paths: Sequence[str | Path], device: torch.device | str = "cpu") -> list[Source]:
    """The dictionaries that `paths` name: folders, folders of folders, globs, hub ids; none is loaded yet.

    Raises GranaryError for a path without dictionaries, and for one that is no stand-in of an MLP.
    """
    found: dict[str, Source] = {}
    for path in paths:
        if matches(Path(path)):
            found |= {source.name: source for source in _of_circuit_tracer(Path(path), torch.device(device))}
            continue
        for name in expand(str(path)):
            folder = locate(name)
            check_whole(name, folder)
            description = describe(folder)
            config, taught = description.config(KINDS), description.provenance.get("model") or {}
            opened = _Folder(folder, torch.device(device))
            found[name] = Source(name, places_of(config, name), opened.open, opened.rows, config, taught)
    return list(found.values())


def _of_circuit_tracer(path: Path, device: torch.device) -> list[Source]:
    """A transcoder per layer, or a CLT, of a folder in circuit-tracer's format."""
    folder = TracerFolder.open(path)
    taught = {} if folder.model is None else {"id": folder.model}

    def rows(layers: Sequence[int], _dictionary: Dictionary) -> list[GroupRows]:
        pairs = (folder.matrices(layer) for layer in layers)
        return [
            FileRows(RowsFile(encoder.file), encoder.name, RowsFile(decoder.file), decoder.name)
            for encoder, decoder in pairs
        ]

    made = tracer_sets.configs(folder)
    if folder.is_clt:
        (config,) = made
        name, layers = str(path), range(len(folder.sites))
        return [
            Source(
                name, places_of(config, name), lambda: tracer_sets.clt(folder, config).to(device),
                partial(rows, layers), config, taught,
            )
        ]  # fmt: skip

    def opened(layer: int) -> Dictionary:
        return tracer_sets.transcoder(folder, made[layer], layer).to(device)

    names = [f"{path}/layer_{layer}" for layer in range(len(made))]
    return [
        Source(name, places_of(made[n], name), partial(opened, n), partial(rows, [n]), made[n], taught)
        for n, name in enumerate(names)
    ]


@dataclass(slots=True)
class _Folder:
    """A dictionary's folder, of which no more is in memory than what is being looked at."""

    folder: Path
    device: torch.device
    is_checked: bool = False

    def open(self) -> Dictionary:
        """Mapped where it stays on the CPU; compared with its digests once."""
        made = load(self.folder, device=self.device, verify=False if self.is_checked else None)
        self.is_checked = True
        return made

    def rows(self, dictionary: Dictionary) -> list[GroupRows]:
        """From the weights file; those of tied decoders, which are made of several, from the dictionary as it is."""
        file = RowsFile(self.folder / WEIGHTS_FILE)
        prefixes = [""] if "W_enc" in file else [f"layers.{number}." for number in range(len(dictionary.groups))]
        if f"{prefixes[0]}W_dec" not in file:
            return held_rows(dictionary)
        return [FileRows(file, f"{prefix}W_enc", file, f"{prefix}W_dec") for prefix in prefixes]


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


def of_dictionary(dictionary: Dictionary) -> Source:
    """One that is loaded."""
    name = f"the {dictionary.config.kind} of {dictionary.sites}"
    return Source(name, places_of(dictionary.config, name), lambda: dictionary)


def need_any(sources: Sequence[Source]) -> None:
    """Raise GranaryError where there is no dictionary at all."""
    if not sources:
        raise GranaryError("give at least one transcoder folder: granary trace RUN text=...")
