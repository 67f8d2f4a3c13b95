"""What a store holds and under which keys: a pure function of its plan.

Shapes: S contexts, T = seq_len positions, D = d_model. Contexts lie in shards of `shard_contexts`; shard i of every
array covers the same contexts. A chunk, the unit of checksum and codec, is `chunk_rows` positions of one context.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Self

import numpy as np

from shared.basics.documents import typed_fields
from shared.basics.errors import GranaryError
from shared.store.format.dtypes import row_bytes, scales_per_row, storage_type
from shared.store.format.site_path import CHUNKS, check_sites, scale_path, site_path

FORMAT_VERSION = 1

TOKENS, MASK, SEGMENTS = "tokens", "mask", "segments"
# Of stores whose contexts hold images beside text.
KIND, IMAGE, CELL, IMAGES = "kind", "image", "cell", "images"
COMPLETE = "_COMPLETE.json"
CODECS = ("none", "lz4", "zstd")
PLACEMENTS = ("spread", "last")
PACKINGS = ("isolated", "joined", "separate")
MAX_SIZE = 2**40
_NUMBER = re.compile(r"\d{1,16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TokenArray:
    """An array [S, T, ...] that is written before any activation, one chunk per context."""

    dtype: str
    """As Zarr calls it."""
    beyond: tuple[int, ...] = ()
    """Axes behind the positions."""
    names: tuple[str, ...] = ()
    """What these are called."""

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    def row_bytes(self, seq_len: int) -> int:
        """Bytes of one context, without its checksum."""
        return seq_len * math.prod(self.beyond) * self.numpy.itemsize

    @property
    def ndim(self) -> int:
        return 2 + len(self.beyond)


TOKEN_ARRAYS = {TOKENS: TokenArray("int32"), MASK: TokenArray("bool"), SEGMENTS: TokenArray("int32")}
IMAGE_ARRAYS = {KIND: TokenArray("uint8"), IMAGE: TokenArray("int32"), CELL: TokenArray("int16", (2,), ("row_col",))}


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """A plan: everything that fixes the bytes of a store, or of one extension of it."""

    num_contexts: int
    seq_len: int
    """Tokens in a context, T."""
    hooks: dict[str, int]
    """Name of a site (``layers.2.resid_post``; see `site_path`) to d_model."""
    dtype: str
    """Storage type: bfloat16, float16, float32 or int8."""
    shard_contexts: int
    """Contexts in a shard: the unit that is written, committed and held out."""
    chunk_tokens: int
    """Wished positions per chunk; `chunk_rows` is the divisor of seq_len nearest to it."""
    codec: str
    """none, lz4 or zstd (both through blosc with bit shuffling)."""
    heldout_fraction: float
    """Share of the shards that training never reads."""
    heldout_placement: str
    """spread evenly over the store, or the last shards."""
    provenance: dict[str, Any]
    """JSON: model, tokenizer, corpus, packing. Part of the identity."""
    versions: dict[str, str]
    """Software versions: recorded, not part of the identity."""

    def __post_init__(self) -> None:
        for name in ("num_contexts", "seq_len", "shard_contexts", "chunk_tokens"):
            check_size(f"a store needs {name}", getattr(self, name))
        if not self.hooks:
            raise GranaryError("a store needs at least one hook")
        storage_type(self.dtype)
        check_sites(self.hooks, scaled=self.dtype == "int8")
        for hook, d_model in self.hooks.items():
            check_size(f"hook {hook} needs d_model", d_model)
        if self.codec not in CODECS:
            raise GranaryError(f"store codec {self.codec!r} is not known: choose from {', '.join(CODECS)}")
        if self.heldout_placement not in PLACEMENTS:
            raise GranaryError(
                f"heldout_placement {self.heldout_placement!r} is not known: choose from {', '.join(PLACEMENTS)}"
            )
        if not 0 <= self.heldout_fraction < 1:
            raise GranaryError(f"heldout_fraction must be in [0, 1), not {self.heldout_fraction}")
        if self.heldout_fraction > 0 and self.num_shards < 2:
            raise GranaryError(
                f"{self.num_contexts} contexts make one shard of {self.shard_contexts}, so none can be held out: "
                "lower shard_contexts, harvest more tokens, or set heldout_fraction=0"
            )
        try:
            canonical_json(self.provenance)
        except (TypeError, ValueError) as error:
            raise GranaryError(f"the provenance of a store must be plain JSON: {error}") from error

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_contexts / self.shard_contexts)

    @property
    def chunk_rows(self) -> int:
        """Positions per chunk: the divisor of seq_len nearest to chunk_tokens by ratio, the larger at a tie."""
        return _nearest_divisor(self.seq_len, self.chunk_tokens)

    @property
    def chunks_per_context(self) -> int:
        return self.seq_len // self.chunk_rows

    @property
    def heldout_shards(self) -> tuple[int, ...]:
        """Shards that training never reads; at least one where heldout_fraction > 0, never all."""
        if self.heldout_fraction == 0:
            return ()
        total = self.num_shards
        held = min(max(1, round(self.heldout_fraction * total)), total - 1)
        if self.heldout_placement == "last":
            return tuple(range(total - held, total))
        return tuple((2 * i + 1) * total // (2 * held) for i in range(held))

    @property
    def has_images(self) -> bool:
        """Whether the contexts hold images beside text (see `shared.store.pictures`)."""
        return IMAGES in self.provenance

    @property
    def token_arrays(self) -> dict[str, TokenArray]:
        """The arrays that are written before any activation."""
        return TOKEN_ARRAYS | (IMAGE_ARRAYS if self.has_images else {})

    @property
    def packing(self) -> str:
        """How documents share a context: ``isolated``, ``joined``, or ``separate`` (one a context, run alone).

        Raises GranaryError for a mode that is none of these: nothing else would run a model as the harvest did.
        """
        recorded = self.provenance.get("packing", {})
        mode = recorded.get("mode", "isolated") if isinstance(recorded, dict) else None
        if mode not in PACKINGS:
            raise GranaryError(f"packing of a store {mode!r} is not known: choose from {', '.join(PACKINGS)}")
        return str(mode)

    def identity(self) -> dict[str, Any]:
        """All that must be equal for two harvests to be the same one, as JSON."""
        record = asdict(self)
        del record["versions"]
        record["chunk_tokens"] = self.chunk_rows
        record["format"] = FORMAT_VERSION
        return record

    def hash(self) -> str:
        """SHA-256 of the identity, in hexadecimal."""
        return self._hash

    @cached_property
    def _hash(self) -> str:  # every commit record is compared with it, and the provenance may be long
        return hashlib.sha256(canonical_json(self.identity())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Inverse of `to_json`."""
        return cls(**typed_fields(cls, record, "its plan"))

    def context_bytes(self, hook: str) -> int:
        """Bytes of one context of one hook before any codec, scales of int8 included, checksums not."""
        return self.seq_len * row_bytes(self.dtype, self.hooks[hook])


def check_size(needs: str, value: object) -> None:
    """Raise GranaryError unless a size is a number that something can be counted with."""
    if type(value) is not int or value < 1:
        raise GranaryError(f"{needs} >= 1, not {value}")
    if value > MAX_SIZE:
        raise GranaryError(f"{needs} <= {MAX_SIZE:,}, not {value:,}")


@cache
def _nearest_divisor(number: int, wish: int) -> int:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = {divisor for n in small for divisor in (n, number // n)}
    return min(divisors, key=lambda n: (abs(math.log(n / wish)), -n))


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def extension_identity(plan: StorePlan) -> dict[str, Any]:
    """What a harvest must share with a store that it extends: all but the contexts, the corpus and the split."""
    record = plan.identity()
    for name in ("num_contexts", "heldout_fraction", "heldout_placement"):
        del record[name]
    record["provenance"] = {key: value for key, value in record["provenance"].items() if key != "corpus"}
    return record


def describe_difference(existing: dict[str, Any], wanted: dict[str, Any]) -> str:
    """``name: existing value, not wanted value`` for every leaf that differs between two identities."""
    old, new = _flatten(existing), _flatten(wanted)
    parts = [
        f"{name} is {_short(old.get(name))}, not {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return "; ".join(parts)


def check_same(url: str, existing: StorePlan, wanted: StorePlan) -> None:
    """Raise GranaryError, naming the fields that differ, unless two plans make the same store."""
    if existing.hash() != wanted.hash():
        difference = describe_difference(existing.identity(), wanted.identity())
        raise GranaryError(f"{url} holds another harvest: {difference}; choose another store.url or the same settings")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    if value is None:
        return "absent"
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def statistics_path(site: str) -> str:
    """Zarr path of a site's [shards, (mean, M2), D] moments."""
    return f"statistics/{site_path(site)}"


def is_moments(path: str) -> bool:
    """Whether a Zarr path is a `statistics_path`."""
    return path.startswith("statistics/")


def chunk_bytes(plan: StorePlan) -> dict[str, int]:
    """Zarr paths of all arrays that grow shard by shard as the harvest goes, to the bytes of a chunk before any codec.

    They are [S, T, D], scales [S, T, G], and moments [shards, 2, D], one chunk each.
    """
    itemsize = storage_type(plan.dtype).numpy.itemsize
    found = {}
    for site, d_model in plan.hooks.items():
        found[site_path(site)] = plan.chunk_rows * d_model * itemsize
        found[statistics_path(site)] = 2 * 8 * d_model
        if plan.dtype == "int8":
            found[scale_path(site)] = plan.chunk_rows * scales_per_row(d_model) * 2
    return found


def shard_arrays(plan: StorePlan) -> set[str]:
    """Zarr paths of all arrays that grow shard by shard as the harvest goes."""
    return set(chunk_bytes(plan))


def object_key(path: str, shard: int, ndim: int) -> str:
    """Key of shard (or chunk) `shard` along the first axis of an array that has one shard along all others."""
    return "/".join([path, CHUNKS, str(shard), *["0"] * (ndim - 1)])


def shard_of_key(key: str, arrays: Collection[str], ndim: int = 3) -> int | None:
    """Inverse of `object_key` for `arrays` of `ndim` dimensions; None for a key that is no object of theirs."""
    path, _, numbers = key.rpartition(f"/{CHUNKS}/")
    shard = numbers.removesuffix("/0" * (ndim - 1))
    if path not in arrays or not _NUMBER.fullmatch(shard) or object_key(path, int(shard), ndim) != key:
        return None
    return int(shard)


def manifest_key(shard: int) -> str:
    """Key of the commit record of a shard."""
    return f"manifest/{shard:08d}.json"


def shard_of_manifest(key: str) -> int | None:
    """Inverse of `manifest_key`; None for a key that is none."""
    number = key.removeprefix("manifest/").removesuffix(".json")
    return int(number) if _NUMBER.fullmatch(number) and manifest_key(int(number)) == key else None


def is_written_first(key: str) -> bool:
    """Whether a key is of what is written before any activation."""
    return key.split("/", 1)[0] in {*TOKEN_ARRAYS, *IMAGE_ARRAYS, IMAGES}


def image_table_key(shard: int) -> str:
    """Key of the table of a shard's images."""
    return f"{IMAGES}/table/{shard:08d}.jsonl"


def shard_of_image_table(key: str) -> int | None:
    """Inverse of `image_table_key`; None for a key that is none."""
    number = key.removeprefix(f"{IMAGES}/table/").removesuffix(".jsonl")
    return int(number) if _NUMBER.fullmatch(number) and image_table_key(int(number)) == key else None


def image_file_key(sha256: str) -> str:
    """Key of an encoded image."""
    return f"{IMAGES}/files/{sha256}"


def extent_key(first_shard: int) -> str:
    """Key of the plan of the harvest (the first, or an extension) that starts at a shard."""
    return f"extents/{first_shard:08d}.json"


def extent_tokens_key(first_shard: int) -> str:
    """Key of the record that says all tokens of an extent are written."""
    return f"extents/{first_shard:08d}.tokens.json"
