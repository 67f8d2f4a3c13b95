"""Stores beside one another: activations of several models at the very same tokens, read as one store.

A site of the first store keeps its name, one of a store beside it is called ``NAME:SITE``, such as
``chat:layers.8.resid_post``. Context i is the same tokens in all of them, or they are refused.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from shared.basics.errors import GranaryError
from shared.store.format import layout
from shared.store.format.extent import TokenRecord
from shared.store.format.manifest import ShardRecord
from shared.store.statistics import HookStatistics
from shared.store.store import Store

SEPARATOR = ":"


class StoresBeside(Store):
    """A store, and others on its tokens. What is held out is for the first to say."""

    def __init__(self, main: Store, beside: Mapping[str, Store]) -> None:
        """Raises GranaryError, naming what differs, for a store of other tokens, and for one with a window."""
        super().__init__(main.io, main.extents, main.window)
        for name, other in beside.items():
            if not name.isidentifier():
                raise GranaryError(f"store.beside name {name!r}: letters, digits and _, such as chat")
            for one in (main, other):
                if one.window is not None:
                    raise GranaryError(f"{one.url} has store.window, so its shards pass one by one: read whole stores")
            different = differences(main, other)
            if different:
                raise GranaryError(
                    f"{other.url} holds other contexts than {main.url}: {'; '.join(different)}. Rows of both must be "
                    "the same token: harvest one model on the other's tokens (corpus=store)"
                )
        self.main, self.beside = main, dict(beside)

    @property
    def hooks(self) -> list[str]:
        return [
            *self.main.hooks,
            *(f"{name}{SEPARATOR}{hook}" for name, one in self.beside.items() for hook in one.hooks),
        ]

    def width(self, hook: str) -> int:
        store, own = self._owner(hook)
        return store.width(own)

    def dtype_of(self, hook: str) -> torch.dtype:
        return self._owner(hook)[0].read_dtype

    def committed(self) -> dict[int, ShardRecord]:
        """Records, in the first store, of the shards that all of them have."""
        theirs = [other.committed().keys() for other in self.beside.values()]
        return {shard: one for shard, one in self.main.committed().items() if all(shard in there for there in theirs)}

    def read_context(
        self, hook: str, context: int, out: torch.Tensor | None = None, *, verify: bool = True
    ) -> torch.Tensor:
        store, own = self._owner(hook)
        return store.read_context(own, context, out, verify=verify)

    def statistics(self, hook: str, shards: Iterable[int] | None = None) -> HookStatistics:
        store, own = self._owner(hook)
        if shards is None:
            shards = [shard for shard in self.committed() if shard not in self.heldout_shards]
        return store.statistics(own, shards)

    def digest(self, shards: Iterable[int] | None = None) -> str:
        """The digest over those of all stores, by name."""
        chosen = sorted(self.committed() if shards is None else shards)
        parts = {"": self.main.digest(chosen), **{name: one.digest(chosen) for name, one in self.beside.items()}}
        return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()

    def _owner(self, hook: str) -> tuple[Store, str]:
        """The store that has a site, and the site's name there."""
        name, separator, own = hook.rpartition(SEPARATOR)
        store = self.beside.get(name) if separator else self.main
        if store is None or own not in store.hooks:
            raise GranaryError(f"the store at {self.url} has no hook {hook}: it has {', '.join(self.hooks)}")
        return store, own


def open_beside(url: str, beside: Sequence[tuple[str, str]]) -> Store:
    """The store at `url` with those beside it, each (name, URL); without any it is the store itself."""
    main = Store.open(url)
    if not beside:
        return main
    names = [name for name, _ in beside]
    if len(set(names)) < len(names):
        raise GranaryError(f"store.beside names {', '.join(names)}: give each store its own name")
    return StoresBeside(main, {name: Store.open(other) for name, other in beside})


def differences(main: Store, other: Store) -> list[str]:
    """What keeps rows of the two from being the same tokens, one text for each; empty where nothing does."""
    found = []
    for what, of in (
        ("tokens per context", lambda store: store.seq_len),
        ("contexts", lambda store: store.num_contexts),
        ("contexts per shard", lambda store: store.plan.shard_contexts),
        ("tokenizer", lambda store: store.plan.provenance.get("tokenizer")),
    ):
        one, two = of(main), of(other)
        if one != two:
            found.append(f"{what} differ" if isinstance(one, dict) else f"{what} {one} and {two}")
    ours, theirs = (sealed_tokens(store) for store in (main, other))
    found += [f"their {name} differ" for name in ours if ours[name] != theirs[name]]
    return found


def sealed_tokens(store: Store) -> dict[str, list[str]]:
    """SHA-256 of every object of tokens, mask and segments, in shard order."""
    total: dict[str, list[str]] = {name: [] for name in layout.TOKEN_ARRAYS}
    for extent in store.extents:
        key = layout.extent_tokens_key(extent.first_shard)
        record = TokenRecord.from_bytes(store.io.get(key), key, extent)
        for name, digests in total.items():
            digests += record.sha256[name]
    return total
