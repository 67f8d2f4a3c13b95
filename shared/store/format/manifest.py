"""Commit records: small JSON objects that carry their own checksum and say what the large objects must be.

A shard exists when its record does. Records hold nothing that differs between two runs of one harvest (no host, no
time), so that a store made in one go and one made in ten are equal byte for byte.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from shared.basics.documents import parse_json, typed_fields
from shared.basics.errors import GranaryError
from shared.store.format import layout
from shared.store.format.checksum import CRC_BYTES, crc32c
from shared.store.format.layout import StorePlan, canonical_json
from shared.store.format.shard import BLOSC_OVERHEAD, ArrayRecord, index_bytes
from shared.store.statistics import NormFigures


class DamagedObjectError(GranaryError):
    """An object is not what was written. `shard` is None where it belongs to no shard."""

    def __init__(self, message: str, *, key: str, shard: int | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.shard = shard


def seal(record: dict[str, Any]) -> bytes:
    """Canonical JSON of `record` with its checksum inside."""
    inner = canonical_json(record)
    return b'{"crc32c":%d,"record":%b}' % (crc32c(inner), inner)  # canonical too, and written out once


def unseal(data: bytes, key: str) -> dict[str, Any]:
    """Inverse of `seal`; raises DamagedObjectError where any bit differs from what was sealed."""
    try:
        sealed = parse_json(data, key)
        record: dict[str, Any] = sealed["record"]
        intact = seal(record) == data
    except (GranaryError, ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact or not isinstance(record, dict):
        raise DamagedObjectError(f"{key} is damaged: it fails its own checksum", key=key)
    return record


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turn what a sealed record of another form makes Python raise into DamagedObjectError.

    A checksum tells that a record is what somebody wrote, not that it was this program.
    """
    try:
        yield
    except DamagedObjectError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, GranaryError) as error:
        raise DamagedObjectError(f"{key} is not a record of this format: {error}", key=key) from error


@dataclass(frozen=True, slots=True, eq=False)
class ShardRecord:
    """The commit record of one shard."""

    shard: int
    first_context: int
    plan_hash: str
    trainable: tuple[int, ...]
    """Masked-in positions of each context of the shard."""
    arrays: dict[str, ArrayRecord]
    """Zarr path of an array (activations, int8 scales, statistics) to its object."""
    norms: dict[str, NormFigures]
    """Hook to the figures over the shard's masked-in positions."""
    crc: int = field(default=0)
    """Checksum of the record itself, set when it is read or written."""

    @property
    def num_contexts(self) -> int:
        return len(self.trainable)

    @property
    def num_tokens(self) -> int:
        """Trainable tokens."""
        return sum(self.trainable)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shard's objects, without tokens and without this record."""
        return sum(array.num_bytes for array in self.arrays.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "first_context": self.first_context,
            "plan_hash": self.plan_hash,
            "tokens": self.num_tokens,
            "trainable": list(self.trainable),
            "arrays": {path: array.to_json() for path, array in self.arrays.items()},
            "norms": {hook: norms.to_json() for hook, norms in self.norms.items()},
        }

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> Self:
        """Read a sealed record; raises DamagedObjectError. `check` says whether it is of a plan."""
        with reading(key):
            record = unseal(data, key)
            return cls(
                **typed_fields(cls, {**record, "crc": crc32c(data)}, "it"),
            )

    def check(self, plan: StorePlan, shard: int, contexts: range, key: str) -> None:
        """Raise DamagedObjectError unless all that it names, and how large that is, is as `plan` has it for `shard`.

        Keys and sizes are then a pure function of the plan, whoever wrote the record.
        """

        def refuse(what: str) -> NoReturn:
            raise DamagedObjectError(f"{key} {what}", key=key, shard=shard)

        if self.plan_hash != plan.hash() or self.shard != shard or self.first_context != contexts.start:
            refuse("belongs to another store or shard")
        positions = range(plan.seq_len + 1)
        if len(self.trainable) != len(contexts) or not all(type(n) is int and n in positions for n in self.trainable):
            refuse("counts other contexts than the plan")
        if self.arrays.keys() != layout.shard_arrays(plan) or self.norms.keys() != plan.hooks.keys():
            refuse("names other arrays than the plan")
        for path, raw in layout.chunk_bytes(plan).items():
            array, sizes = self.arrays[path], self.arrays[path].chunk_bytes
            if array.key != layout.object_key(path, shard, 3):
                refuse(f"names {array.key!r} as an object of {path}")
            moments = layout.is_moments(path)
            compressed = plan.codec != "none" and not moments
            least, most = (1, raw + BLOSC_OVERHEAD) if compressed else (raw, raw)
            chunks = 1 if moments else len(contexts) * plan.chunks_per_context
            if sizes.shape != (chunks,) or sizes.min() < least + CRC_BYTES or sizes.max() > most + CRC_BYTES:
                refuse(f"gives {path} chunks of other sizes than the plan")
            index = 0 if moments else index_bytes(plan.shard_contexts * plan.chunks_per_context)
            if array.num_bytes != int(sizes.sum()) + index:
                refuse(f"gives {path} another size than its chunks have")
