"""Open the stores of a run and pin what of them it may read, the same on every rank and after every resume."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.parallel import World, broadcast_object
from shared.store import HookStatistics, Store
from shared.store.beside import open_beside
from stage_train.config import TrainSchema
from stage_train.data.stream import StoreSlice


@dataclass(frozen=True)
class PinnedStore:
    """A store, and the training shards of it that were committed when the run began (with a window: all planned)."""

    store: Store
    weight: float
    shards: tuple[int, ...]

    @property
    def slice(self) -> StoreSlice:
        """The store's part that the stream reads."""
        contexts = [np.asarray(self.store.shard_contexts(shard), np.int64) for shard in self.shards]
        return StoreSlice(self.store, np.concatenate([np.empty(0, np.int64), *contexts]), self.weight)

    def record(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {
            "url": self.store.url,
            "plan": self.store.plan.hash(),
            "weight": self.weight,
            "shards": list(self.shards),
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """What the activations are; with a window, which has not all of them yet, what they will be."""
        window = self.store.window
        if window is None:
            return self.store.digest(self.shards)
        return hashlib.sha256(self.store.plan.hash().encode() + window.plan.to_bytes()).hexdigest()

    @property
    def measured_shards(self) -> tuple[int, ...]:
        """The shards whose statistics stand for all: every one, or with a window the first block."""
        window = self.store.window
        return self.shards if window is None else tuple(shard for shard in self.shards if shard < window.plan.ends[0])


Beside = Sequence[tuple[str, str]]
"""(Name, URL) of stores of other models on the first one's tokens."""


def urls_of(cfg: TrainSchema) -> list[tuple[str, float]]:
    """URL and weight of every store that a configuration names."""
    return [(cfg.store.url, cfg.store.weight), *((other.url, other.weight) for other in cfg.store.others)]


def open_all(urls: Sequence[tuple[str, float]], beside: Beside) -> list[Store]:
    """The stores, the first with those beside it. Raises GranaryError where several stores would each need others."""
    if beside and len(urls) > 1:
        raise GranaryError("store.beside and store.others: rows of several stores have no one token beside them")
    return [open_beside(url, beside) for url, _ in urls]


def pin(urls: Sequence[tuple[str, float]], world: World, beside: Beside = ()) -> list[PinnedStore]:
    """Open stores and take their committed training shards; rank 0's listing holds for all ranks.

    Raises GranaryError for a missing store, one without a committed training shard, and a weight that is not positive.
    """
    for url, weight in urls:
        if not weight > 0:
            raise GranaryError(f"store weight {weight} of {url}: it must be above 0")
    pinned = []
    for (url, weight), store in zip(urls, open_all(urls, beside), strict=True):
        # With a window the harvest has only begun: what it will have made is known all the same.
        known = store.committed() if store.window is None else range(store.num_shards)
        mine = tuple(shard for shard in known if shard not in store.heldout_shards)
        shards = broadcast_object(mine)
        if not shards:
            raise GranaryError(
                f"the store at {url} has no committed training shard yet: go on with {program('harvest')}, or "
                "wait for its first one"
            )
        pinned.append(PinnedStore(store, weight, shards))
    return pinned


def repin(
    urls: Sequence[tuple[str, float]], records: Sequence[Mapping[str, Any]], beside: Beside = ()
) -> list[PinnedStore]:
    """The shards that a checkpoint names, from stores that may have moved or grown since.

    Raises GranaryError when a store no longer holds the same activations.
    """
    if len(urls) != len(records):
        raise GranaryError(f"the checkpoint was trained on {len(records)} stores, the configuration has {len(urls)}")
    pinned = []
    for (url, weight), store, record in zip(urls, open_all(urls, beside), records, strict=True):
        part = PinnedStore(store, weight, tuple(record["shards"]))
        if weight != record["weight"]:
            raise GranaryError(f"store weight of {url} was {record['weight']}, is {weight}: use the same to continue")
        missing = [] if part.store.window is not None else sorted(set(part.shards) - set(part.store.committed()))
        if missing:
            raise GranaryError(f"shard {missing[0]} of {url}, on which this run was trained, is gone: harvest it again")
        if part.digest() != record["digest"]:
            raise GranaryError(f"the store at {url} does not hold the activations that this run began with")
        pinned.append(part)
    return pinned


def combined_statistics(stores: Sequence[PinnedStore], parts: Sequence[HookStatistics]) -> HookStatistics:
    """The stores' statistics as one, each token counted by its store's weight."""
    if len(parts) == 1:
        return parts[0]
    weights = [store.weight * part.count for store, part in zip(stores, parts, strict=True)]
    total = sum(weights)

    def average(values: Sequence[Any]) -> Any:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / total

    mean = average([part.mean for part in parts])
    return HookStatistics(
        count=sum(part.count for part in parts),
        mean=mean,
        var=average([part.var + (part.mean - mean) ** 2 for part in parts]),
        mean_norm=average([part.mean_norm for part in parts]),
        rms_norm=average([part.rms_norm**2 for part in parts]) ** 0.5,
        median_norm=average([part.median_norm for part in parts]),
        max_norm=max(part.max_norm for part in parts),
        relative_squared_error=average([part.relative_squared_error for part in parts]),
    )
