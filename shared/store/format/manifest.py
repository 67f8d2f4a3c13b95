"""Commit records: small JSON objects that carry their own checksum and say what the large objects must be.

A shard exists when its record does. Records hold nothing that differs between two runs of one harvest (no host, no
time), so that a store made in one go and one made in ten are equal byte for byte.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Self

from shared.basics.errors import GranaryError
from shared.store.format.checksum import crc32c
from shared.store.format.layout import canonical_json
from shared.store.format.shard import ArrayRecord
from shared.store.statistics import NormFigures


class DamagedObjectError(GranaryError):
    """An object is not what was written. `shard` is None where it belongs to no shard."""

    def __init__(self, message: str, *, key: str, shard: int | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.shard = shard


def seal(record: dict[str, Any]) -> bytes:
    """Canonical JSON of `record` with its checksum inside."""
    return canonical_json({"crc32c": crc32c(canonical_json(record)), "record": record})


def unseal(data: bytes, key: str) -> dict[str, Any]:
    """Inverse of `seal`; raises DamagedObjectError where any bit differs from what was sealed."""
    try:
        sealed = json.loads(data)
        record: dict[str, Any] = sealed["record"]
        intact = seal(record) == data
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedObjectError(f"{key} is damaged: it fails its own checksum", key=key)
    return record


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
        """Read a sealed record; raises DamagedObjectError."""
        record = unseal(data, key)
        return cls(
            shard=record["shard"],
            first_context=record["first_context"],
            plan_hash=record["plan_hash"],
            trainable=tuple(record["trainable"]),
            arrays={path: ArrayRecord.from_json(array) for path, array in record["arrays"].items()},
            norms={hook: NormFigures.from_json(norms) for hook, norms in record["norms"].items()},
            crc=crc32c(data),
        )
