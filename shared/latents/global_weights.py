"""A folder of global weights, open: what feeds each latent of all layers and what it feeds, over a whole corpus.

    weights = GlobalWeights.open("runs/demo/transcoders/weights")
    for one in weights.sources(2, 237): print(one.layer, one.latent, one.twera)

A Zarr v3 group and ``meta.json``, which is written last. `docs/tracing.md` has the formulas. Latents are numbered layer
after layer. Axes: F latents of all layers, n connections kept per latent and direction.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from shared.basics.documents import parse_json, typed_at, typed_fields
from shared.basics.errors import GranaryError
from shared.latents.arrays import ArrayReader, ArrayWriter, ChunkCache
from shared.latents.layout import META, NONE, ArraySpec
from shared.store.format.metadata import group_document
from shared.store.io.base import ObjectIO, ObjectMissingError
from shared.store.io.open import open_io

VERSION = 1
MAGIC = "granary_global_weights"
MOST = 1024
DIRECTIONS = ("sources", "targets")
COLUMNS = {"latent": "int32", "twera": "float32", "era": "float32", "weight": "float32", "both": "uint32"}
ARRAYS = {
    f"{direction}/{name}": ArraySpec(dtype, ("F", "n"), 256)
    for direction in DIRECTIONS
    for name, dtype in COLUMNS.items()
} | {"fired": ArraySpec("uint32", ("F",), 1 << 16)}

Direction = Literal["sources", "targets"]


@dataclass(frozen=True, slots=True)
class Connection:
    """A latent at the other end of a virtual weight, and how much passes."""

    layer: int
    latent: int
    """Its number within the layer."""
    twera: float
    """What it adds to the target's pre-activation, averaged over tokens with the target's activation as weight."""
    era: float
    """The same over all tokens, those on which the target is silent counted as 0."""
    weight: float
    """The virtual weight: what one unit of the source's activation adds."""
    both: int
    """Tokens of the sample on which both fired."""


@dataclass(frozen=True, slots=True)
class WeightsLayer:
    """The latents that read at one layer."""

    layer: int
    num_latents: int
    dictionary: str
    """Where it was found."""
    sha256: str | None
    """Hash of its weights file, where it is one of this project's folders."""
    first: int
    """Number of the layer's first latent in its dictionary, and in a latents folder of that."""
    norm_factor: float
    """Mean factor of the norm that it reads behind; 1 where it reads the stream itself."""


@dataclass(frozen=True, kw_only=True)
class WeightsMeta:
    """Facts of the whole folder."""

    layers: list[dict[str, Any]]
    """As `WeightsLayer`, ascending."""
    most: int
    """n."""
    tokens: int
    """Of the sample behind the averages."""
    store: dict[str, Any]
    """url, digest and shards used."""
    model: dict[str, Any]
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """JSON for people too."""
        return (json.dumps({MAGIC: VERSION, **asdict(self)}, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def read(cls, io: ObjectIO) -> Self:
        """Raises GranaryError where there is no finished folder of global weights, or one of a newer format."""
        try:
            record = parse_json(io.get(META), META)
            version = typed_at(record, MAGIC, int, META)
            if version > VERSION:
                raise GranaryError(f"{io.url} has format {version}, this Granary reads up to {VERSION}: upgrade it")
            found = cls(**typed_fields(cls, record, META))
            layers = found.parsed()
        except ObjectMissingError:
            raise GranaryError(f"no global weights at {io.url}: make them with granary trace weights") from None
        in_order = all(one.layer < other.layer for one, other in pairwise(layers))
        if not (0 < found.most <= MOST and in_order and all(one.num_latents > 0 <= one.first for one in layers)):
            raise GranaryError(f"{META} of {io.url} is damaged: run granary trace weights again")
        return found

    def parsed(self) -> list[WeightsLayer]:
        """Raises GranaryError for a layer whose record is damaged."""
        return [WeightsLayer(**typed_fields(WeightsLayer, one, META)) for one in self.layers]


class GlobalWeights:
    """A folder of global weights at a local path or any fsspec URL. Safe to use from several threads."""

    def __init__(self, io: ObjectIO, meta: WeightsMeta) -> None:
        """Use `open`."""
        self.io, self.meta = io, meta
        self.layers: Mapping[int, WeightsLayer] = {one.layer: one for one in meta.parsed()}
        ends = np.cumsum([0, *(one.num_latents for one in self.layers.values())])
        self._ends: npt.NDArray[np.int64] = ends
        self._order = list(self.layers)
        self._cache = ChunkCache()
        self._arrays: dict[str, ArrayReader] = {}

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Self:
        """Raises GranaryError where there is no finished folder."""
        io = open_io(url)
        return cls(io, WeightsMeta.read(io))

    @property
    def num_latents(self) -> int:
        """The latents of all layers."""
        return int(self._ends[-1])

    def number(self, layer: int, latent: int) -> int:
        """Among the latents of all layers; raises GranaryError for one that is not there."""
        held = self.layers.get(layer)
        if held is None or not 0 <= latent < held.num_latents:
            raise GranaryError(f"{self.io.url} has no latent {latent} of layer {layer}")
        return int(self._ends[self._order.index(layer)]) + latent

    def place(self, number: int) -> tuple[int, int]:
        """(layer, latent) of a number among those of all layers; raises GranaryError for one that is not there."""
        if not 0 <= number < self.num_latents:
            raise GranaryError(f"{self.io.url} has no latent numbered {number}: it is damaged, or was it a typo?")
        at = int(np.searchsorted(self._ends, number, side="right")) - 1
        return self._order[at], number - int(self._ends[at])

    def sources(self, layer: int, latent: int) -> list[Connection]:
        """What feeds a latent; the largest ``twera``, of either sign, first."""
        return self._connections("sources", self.number(layer, latent))

    def targets(self, layer: int, latent: int) -> list[Connection]:
        """What a latent feeds; the largest ``twera``, of either sign, first."""
        return self._connections("targets", self.number(layer, latent))

    def array(self, path: str) -> ArrayReader:
        """One of `ARRAYS`."""
        if path not in self._arrays:
            spec = ARRAYS[path]
            self._arrays[path] = ArrayReader(self.io, path, spec, spec.row_shape({"n": self.meta.most}), self._cache)
        return self._arrays[path]

    def _connections(self, direction: Direction, number: int) -> list[Connection]:
        columns = [self.array(f"{direction}/{name}").row(number).tolist() for name in COLUMNS]
        rows = zip(*columns, strict=True)
        return [Connection(*self.place(latent), *held) for latent, *held in rows if latent != NONE]


class GlobalWeightsWriter:
    """Fills one folder, rows in the order of the latents."""

    def __init__(self, io: ObjectIO, most: int) -> None:
        """Start a folder, or start it again: what arrays it had are removed, ``meta.json`` first."""
        io.delete(META)
        for key in io.listing():
            if key.partition("/")[0] in (*DIRECTIONS, "fired", "zarr.json"):
                io.delete(key)
        self.io = io
        self._writers = {
            path: ArrayWriter(io, path, spec, spec.row_shape({"n": most})) for path, spec in ARRAYS.items()
        }

    def append(self, path: str, rows: npt.NDArray[Any]) -> None:
        """Rows to one of `ARRAYS`."""
        self._writers[path].append(rows)

    def finish(self, meta: WeightsMeta) -> None:
        """Write what is left, and ``meta.json`` last."""
        for writer in self._writers.values():
            writer.close()
        for group in (*(f"{direction}/" for direction in DIRECTIONS), ""):
            self.io.put(f"{group}zarr.json", [group_document({}).encode()], replace=True)
        self.io.put(META, [meta.to_bytes()], replace=True)
