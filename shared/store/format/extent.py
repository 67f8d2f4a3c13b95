"""Extents: the harvest that made a store, and each one that extended it later.

An extent is a run of whole shards with a plan of its own. Its records are the claim (plan and metadata documents), put
first, and the token record, put when all its tokens, masks and segments are written.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shared.basics.documents import typed_fields
from shared.basics.errors import GranaryError
from shared.store.buffers import Buffer
from shared.store.format import layout
from shared.store.format.checksum import CRC_BYTES
from shared.store.format.image_table import Pictures, read_table
from shared.store.format.integrity import object_sha256
from shared.store.format.layout import StorePlan
from shared.store.format.manifest import DamagedObjectError, reading, seal, unseal
from shared.store.format.metadata import document_keys, metadata_documents
from shared.store.format.shard import encode_chunks, encode_index, index_bytes
from shared.store.io.base import BusyObjectError, ObjectIO
from shared.store.reader import damaged

TOKEN_THREADS = 4
# How long a small object that another process is writing is waited for.
BUSY_SECONDS = 10.0
DIGEST_CHARACTERS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Shards [first_shard, end_shard) of a store and the plan they follow."""

    first_shard: int
    plan: StorePlan
    documents: dict[str, str]
    """Key to text of every zarr.json as of this extent."""

    @property
    def first_context(self) -> int:
        return self.first_shard * self.plan.shard_contexts

    @property
    def end_shard(self) -> int:
        return self.first_shard + self.plan.num_shards

    @property
    def end_context(self) -> int:
        return self.first_context + self.plan.num_contexts

    @property
    def heldout(self) -> frozenset[int]:
        return frozenset(self.first_shard + shard for shard in self.plan.heldout_shards)

    def contexts(self, shard: int) -> range:
        """Contexts of one of the extent's shards; the last shard may be short."""
        start = shard * self.plan.shard_contexts
        return range(start, min(start + self.plan.shard_contexts, self.end_context))

    @classmethod
    def planned(cls, plan: StorePlan, earlier: Sequence["Extent"] = ()) -> Self:
        """The extent that `plan` makes behind those that exist."""
        first_shard = earlier[-1].end_shard if earlier else 0
        num_contexts = first_shard * plan.shard_contexts + plan.num_contexts
        plans = [extent.plan for extent in earlier] + [plan]
        return cls(first_shard, plan, metadata_documents(plans, num_contexts, first_shard + plan.num_shards))

    def to_bytes(self) -> bytes:
        return seal(
            {
                "format": layout.FORMAT_VERSION,
                "first_shard": self.first_shard,
                "plan": self.plan.to_json(),
                "plan_hash": self.plan.hash(),
                "documents": self.documents,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Self:
        """Raises DamagedObjectError, or GranaryError for a format this version does not know."""
        with reading(key):
            record = unseal(data, key)
            version = record["format"]
            if not isinstance(version, int):
                raise ValueError(f"its format is {version!r}")
        if version > layout.FORMAT_VERSION:
            raise GranaryError(
                f"the store has format {version}, this Granary reads up to {layout.FORMAT_VERSION}: upgrade it"
            )
        with reading(key):
            extent = cls(record["first_shard"], StorePlan.from_json(record["plan"]), dict(record["documents"]))
            if type(extent.first_shard) is not int or layout.extent_key(extent.first_shard) != key:
                raise ValueError(f"it begins at shard {extent.first_shard}")
            if extent.documents.keys() != document_keys(extent.plan):
                raise ValueError("it holds other documents than its plan")
            if not all(isinstance(text, str) for text in extent.documents.values()):
                raise ValueError("a document is no text")
            return extent

    @property
    def least_record_bytes(self) -> int:
        """What the digests of its tokens take at least in their record."""
        return len(self.recorded_names) * DIGEST_CHARACTERS * self.plan.num_shards

    @property
    def recorded_names(self) -> list[str]:
        """What its token record is of: the arrays, and with images the tables of them."""
        return [*self.plan.token_arrays, *([layout.IMAGES] if self.plan.has_images else [])]

    def check_backing(self, io: ObjectIO) -> None:
        """Raise DamagedObjectError where the plan is for more than is there.

        The tokens of all contexts are written before anything else, so what they take bounds every number of shards,
        contexts and positions that a plan may name.
        """
        key = layout.extent_tokens_key(self.first_shard)
        if (io.size(key) or 0) < self.least_record_bytes:
            raise DamagedObjectError(f"{io.url}: {key} is too small for {self.plan.num_shards:,} shards", key=key)
        tokens = layout.object_key(layout.TOKENS, self.first_shard, 2)
        rows = min(self.plan.num_contexts, self.plan.shard_contexts)
        row_bytes = layout.TOKEN_ARRAYS[layout.TOKENS].row_bytes(self.plan.seq_len) + CRC_BYTES
        wanted, found = rows * row_bytes + index_bytes(self.plan.shard_contexts), io.size(tokens)
        if found != wanted:
            has = "is missing" if found is None else f"has {found:,} bytes, the plan says {wanted:,}"
            raise damaged(io.url, tokens, self.first_shard, has)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRecord:
    """Bytes and checksums of the objects of an extent that are written before any activation."""

    sizes: dict[str, list[int]]
    sha256: dict[str, list[str]]

    def to_bytes(self) -> bytes:
        return seal({"sizes": self.sizes, "sha256": self.sha256})

    @classmethod
    def from_bytes(cls, data: bytes, key: str, extent: Extent) -> Self:
        """Raises DamagedObjectError for a record that is not of `extent`."""
        with reading(key):
            record = unseal(data, key)
            found = typed_fields(cls, record, "its record")
            if any(part.keys() != set(extent.recorded_names) for part in found.values()):
                raise ValueError(f"it is not of {', '.join(extent.recorded_names)}")
            return cls(**found)


def write_extent(
    io: ObjectIO, extent: Extent, tokens: Any, mask: Any, segments: Any, pictures: Pictures | None = None
) -> None:
    """Write everything of an extent but its activations, from where a killed writer stopped.

    The arrays are [num_contexts, T] and anything sliceable. Every object is a pure function of the input, so what is
    already there is either equal or an error.
    """
    plan = extent.plan
    sources = {layout.TOKENS: tokens, layout.MASK: mask, layout.SEGMENTS: segments}
    if plan.has_images != (pictures is not None):
        raise TypeError("a store whose plan tells of images is made with them, and no other")
    if pictures is not None:
        sources |= {layout.KIND: pictures.kind, layout.IMAGE: pictures.image, layout.CELL: pictures.cell}
    for name, source in sources.items():
        wanted = (plan.num_contexts, plan.seq_len, *plan.token_arrays[name].beyond)
        if tuple(source.shape) != wanted:
            raise GranaryError(f"{name} has shape {tuple(source.shape)}, the plan says {wanted}")
        if name != layout.MASK and not np.issubdtype(source.dtype, np.integer):
            raise GranaryError(f"{name} must be integers, not {source.dtype}")
    for key, text in extent.documents.items():
        put_same(io, key, text.encode(), replace=extent.first_shard > 0)
    jobs = [(name, shard) for shard in range(extent.first_shard, extent.end_shard) for name in extent.recorded_names]

    def write(job: tuple[str, int]) -> tuple[int, str]:
        name, shard = job
        contexts = extent.contexts(shard)
        rows = slice(contexts.start - extent.first_context, contexts.stop - extent.first_context)
        if name == layout.IMAGES:
            assert pictures is not None
            return write_pictures(io, shard, pictures, rows)
        return write_token_object(io, plan, name, shard, sources[name][rows])

    with ThreadPoolExecutor(TOKEN_THREADS, thread_name_prefix="granary-tokens") as pool:
        figures = list(pool.map(write, jobs))
    record = TokenRecord({name: [] for name in extent.recorded_names}, {name: [] for name in extent.recorded_names})
    for (name, _), (size, digest) in zip(jobs, figures, strict=True):
        record.sizes[name].append(size)
        record.sha256[name].append(digest)
    put_same(io, layout.extent_tokens_key(extent.first_shard), record.to_bytes())


def write_token_object(io: ObjectIO, plan: StorePlan, name: str, shard: int, rows: npt.NDArray[Any]) -> tuple[int, str]:
    """One shard of an array of `plan.token_arrays`, one chunk per context; returns its bytes and checksum."""
    array = plan.token_arrays[name]
    stored = np.ascontiguousarray(rows, dtype=array.numpy)
    if not np.array_equal(stored, rows):
        raise GranaryError(f"{name} of shard {shard} holds values that do not fit {array.dtype}")
    chunks = encode_chunks(stored, 1, "none")
    parts: list[Buffer] = [part for chunk in chunks for part in chunk.parts()]
    parts.append(encode_index([chunk.num_bytes for chunk in chunks], plan.shard_contexts))
    data = b"".join(parts)
    put_same(io, layout.object_key(name, shard, array.ndim), data)
    return len(data), sha256(data).hexdigest()


def write_pictures(io: ObjectIO, shard: int, pictures: Pictures, rows: slice) -> tuple[int, str]:
    """The encoded images of a shard, each once in the store, then their table; returns its bytes and checksum."""
    table = pictures.table[rows]
    for digest in dict.fromkeys(row.sha256 for row in read_table(table, "the table of images")):
        put_same(io, layout.image_file_key(digest), pictures.data(digest))
    put_same(io, layout.image_table_key(shard), table)
    return len(table), sha256(table).hexdigest()


def put_same(io: ObjectIO, key: str, data: bytes, *, replace: bool = False) -> None:
    """Put a small object; where the key is taken it must hold these very bytes.

    Where another process is writing it, and so the same, waits for that: two that refused each other would both end.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if io.put(key, [data], replace=replace):
                return
            break
        except BusyObjectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    size = io.size(key)
    if size != len(data) or object_sha256(io, key, size) != sha256(data).hexdigest():
        raise GranaryError(
            f"{io.url}/{key} exists with other content: it belongs to another harvest; choose another store.url, or "
            "delete the folder if it is a broken leftover"
        )


def read_extents(io: ObjectIO) -> list[Extent]:
    """All extents in shard order; empty where the URL holds no store."""
    keys = [key for key in sorted(io.listing("extents")) if not key.endswith(".tokens.json")]
    extents = [Extent.from_bytes(io.get(key), key) for key in keys]
    for before, extent in pairwise(extents):
        if extent.first_shard != before.end_shard:
            key = layout.extent_key(extent.first_shard)
            raise DamagedObjectError(f"{io.url}: {key} does not follow the shards before it", key=key)
    return extents


def is_foreign(io: ObjectIO) -> bool:
    """True where the URL holds a Zarr group that Granary did not make."""
    return io.size("zarr.json") is not None and b"granary_format" not in io.get("zarr.json")
