"""The store: one object that stages create, fill and read.

Shapes: S contexts, T = seq_len, D = d_model of a hook, n contexts asked for.
"""

import bisect
import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from shared.basics.errors import GranaryError
from shared.launch import commands
from shared.store.added import AddedIO, additions, check_addition
from shared.store.buffers import empty_to_read
from shared.store.format import layout
from shared.store.format.dtypes import storage_type
from shared.store.format.extent import Extent, is_foreign, put_same, read_extents, write_extent
from shared.store.format.image_table import Pictures
from shared.store.format.layout import StorePlan
from shared.store.format.manifest import DamagedObjectError, ShardRecord, reading, seal, unseal
from shared.store.io.base import ObjectIO
from shared.store.io.open import open_io
from shared.store.io.threads import on_threads
from shared.store.pictures import StoredPictures
from shared.store.reader import ContextReader, read_dtype_error, read_moments, read_token_contexts
from shared.store.statistics import HookStatistics, Moments, RowStatistics, merge_rows
from shared.store.window import Window
from shared.store.writer import ShardWriter

Split = Literal["train", "heldout", "all"]


class Store:
    """An activation store at a local path or any fsspec URL.

    Readers trust commit records only. All methods may be called from several threads.
    """

    def __init__(self, io: ObjectIO, extents: Sequence[Extent], window: Window | None) -> None:
        """Use `create` or `open`."""
        self.io = io
        self.window = window
        """The window by which the harvest may run ahead of training; None where it may run to its end."""
        self.extents = tuple(extents)
        self._lock = threading.Lock()
        self._records: dict[int, ShardRecord] = {}
        self._writers: dict[int, ShardWriter] = {}
        self._reader = ContextReader(io, self.plan)
        self.additions: tuple[Store, ...] = ()
        """Sites added later, a store for each harvest that added some; those that are complete."""
        self._first_shards = [extent.first_shard for extent in extents]

    # What it is

    @property
    def url(self) -> str:
        return self.io.url

    @property
    def plan(self) -> StorePlan:
        """The plan of the harvest that made the store."""
        return self.extents[0].plan

    @property
    def hooks(self) -> list[str]:
        """Names of all sites, those of the first harvest first."""
        return [hook for part in (self, *self.additions) for hook in part.plan.hooks]

    @property
    def num_contexts(self) -> int:
        """Length of the arrays: contexts planned, committed or not."""
        return self.extents[-1].end_context

    @property
    def num_shards(self) -> int:
        return self.extents[-1].end_shard

    @property
    def seq_len(self) -> int:
        return self.plan.seq_len

    @property
    def isolated(self) -> bool:
        """Whether each document has the activations it has alone, and positions from its own start."""
        return self.plan.packing != "joined"

    @property
    def read_dtype(self) -> torch.dtype:
        """Dtype of `read_context`: the stored one; bfloat16 for int8 stores."""
        return storage_type(self.plan.dtype).read

    @cached_property
    def pictures(self) -> StoredPictures:
        """The images of its contexts; raises GranaryError for a store of text alone."""
        if not self.plan.has_images:
            raise GranaryError(f"the store at {self.url} is of text alone: harvest one with corpus.images")
        return StoredPictures(self.io, self.plan.provenance, self.token_rows, self.shard_of)

    def width(self, hook: str) -> int:
        """Features of a site."""
        return self._holder(hook).plan.hooks[hook]

    def _holder(self, hook: str) -> "Store":
        """The store itself, or the addition that has the site; raises GranaryError where there is none."""
        for part in (self, *self.additions):
            if hook in part.plan.hooks:
                return part
        raise GranaryError(f"the store at {self.url} has no hook {hook}: it has {', '.join(self.hooks)}")

    def dtype_of(self, hook: str) -> torch.dtype:
        """Dtype of `read_context` for a site."""
        return self.read_dtype

    @cached_property
    def heldout_shards(self) -> frozenset[int]:
        """Shards that training never reads."""
        return frozenset().union(*(extent.heldout for extent in self.extents))

    # Making one

    @classmethod
    def create(
        cls,
        url: str | os.PathLike[str] | ObjectIO,
        plan: StorePlan,
        tokens: Any,
        mask: Any,
        segments: Any,
        window_bytes: int | None = None,
        pictures: Pictures | None = None,
    ) -> Self:
        """Make the store and write its tokens, or open the one that the same plan made before.

        `tokens`, `mask`, `segments` are [S, T] int32, bool, int32, and anything sliceable (a numpy memmap); `pictures`
        are the images of a multimodal plan. A creation that was killed half-way is completed. `window_bytes` bounds how
        far the harvest may run ahead of training (see shared.store.window). Raises GranaryError naming the fields where
        the URL holds a store of another plan.
        """
        io = open_io(url)
        key = layout.extent_key(0)
        wanted = Extent.planned(plan)
        if io.size(key) is None and is_foreign(io):
            raise GranaryError(f"{io.url} holds a Zarr group that is not a Granary store: choose another store.url")
        io.put(key, [wanted.to_bytes()])
        existing = Extent.from_bytes(io.get(key), key)
        layout.check_same(io.url, existing.plan, plan)
        fresh = io.size(layout.extent_tokens_key(0)) is None
        Window.settle(io, plan, window_bytes, fresh=fresh)
        if fresh:
            write_extent(io, existing, tokens, mask, segments, pictures)
        store = cls.open(io)
        store.io.claim(exclusive=False)
        store.sweep()
        return store

    @classmethod
    def append(cls, url: str | os.PathLike[str], plan: StorePlan, tokens: Any, mask: Any, segments: Any) -> Self:
        """Extend the store at `url` by the contexts of another harvest, from the next whole shard on.

        Its format, model, tokenizer and hooks must be those of the store (GranaryError naming what differs); corpus and
        held-out share may differ. The same plan again completes or opens the extension it made before. The new shards
        are in `pending` until they are harvested.
        """
        store = cls.open(url)
        if store.window is not None or plan.has_images:
            has = "images" if plan.has_images else "store.window"
            raise GranaryError(f"{url} has {has} and cannot be extended: harvest the new tokens into another store")
        if next(additions(store.io), None) is not None:
            raise GranaryError(f"{url} has sites that were added later and cannot be extended: make another store")
        io = store.io
        difference = layout.describe_difference(layout.extension_identity(store.plan), layout.extension_identity(plan))
        if difference:
            raise GranaryError(f"{io.url} cannot be extended by this harvest: {difference}")
        extents = read_extents(io)
        same = [extent for extent in extents if extent.plan.hash() == plan.hash()]
        if not same and len(extents) > len(store.extents):
            raise GranaryError(
                f"another extension of {io.url} was begun and not finished: run its harvest again, or remove it with "
                f"`{commands.line('store', 'drop-incomplete', io.url)}`"
            )
        extent = same[0] if same else Extent.planned(plan, extents)
        put_same(io, layout.extent_key(extent.first_shard), extent.to_bytes())
        if io.size(layout.extent_tokens_key(extent.first_shard)) is None:
            write_extent(io, extent, tokens, mask, segments)
        store = cls.open(url)
        store.io.claim(exclusive=False)
        return store

    @classmethod
    def open(cls, url: str | os.PathLike[str] | ObjectIO) -> Self:
        """Open a store; raises GranaryError where there is none, or one of a newer format, or a half-made one."""
        io = open_io(url)
        extents = read_extents(io)
        if not extents:
            if is_foreign(io):
                raise GranaryError(f"{io.url} holds a Zarr group that is not a Granary store: check store.url")
            raise GranaryError(
                f"no activation store at {io.url}: make one with {commands.program('harvest')}, or check store.url"
            )
        finished = [extent for extent in extents if io.size(layout.extent_tokens_key(extent.first_shard)) is not None]
        if extents[0] not in finished:
            raise GranaryError(f"the store at {io.url} has no tokens yet: run its harvest again to complete it")
        for extent in finished:
            extent.check_backing(io)
        store = cls(io, finished, Window.find(io, finished[0].plan))
        if not isinstance(io, AddedIO):
            complete = [place for place in additions(io) if place.size(layout.COMPLETE) is not None]
            store.additions = tuple(Store.open(place) for place in complete)
            for place, added in zip(complete, store.additions, strict=True):
                check_addition(io.url, added.plan, place.name, store.plan)
        return store

    def check_plan(self, plan: StorePlan, window_bytes: int | None) -> None:
        """Raise GranaryError, naming the fields that differ, unless `plan` made this store; writes nothing."""
        layout.check_same(self.url, self.plan, plan)
        Window.settle(self.io, plan, window_bytes, fresh=False)

    def extent_of(self, shard: int) -> Extent:
        """The extent a shard belongs to; raises GranaryError for a shard that is not planned."""
        if not 0 <= shard < self.num_shards:
            raise GranaryError(f"shard {shard} is not in the store: it has shards 0 to {self.num_shards - 1}")
        return self.extents[bisect.bisect_right(self._first_shards, shard) - 1]

    def shard_contexts(self, shard: int) -> range:
        """Contexts that a shard covers."""
        return self.extent_of(shard).contexts(shard)

    def shard_of(self, context: int) -> int:
        """Shard that covers a context; raises GranaryError where none does."""
        shard = context // self.plan.shard_contexts
        if context < 0 or shard >= self.num_shards or context not in self.shard_contexts(shard):
            raise GranaryError(f"context {context} is not in the store: it has {self.num_contexts}")
        return shard

    def pending(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards without a commit record that fall to `rank` of `world`, round robin."""
        committed = self.committed()
        return [shard for shard in range(self.num_shards) if shard not in committed][rank::world]

    def write_shard(self, shard: int, activations: dict[str, torch.Tensor]) -> ShardRecord:
        """Write one shard of every hook and commit it; a committed shard is left as it is.

        `activations[hook]` is [n, T, D] for the n contexts of the shard, on the CPU; a tensor that has the stored dtype
        already goes to the file without a copy, any other float dtype is converted. Raises GranaryError for a wrong
        shape, NaN or infinity at a trainable position (naming hook, context, position) and a full disk; nothing
        is committed then.
        """
        extent = self.extent_of(shard)
        if self.io.size(layout.manifest_key(shard)) is not None:
            return self._record(shard)
        contexts = extent.contexts(shard)
        record = self._writer(extent).write(shard, contexts.start, self.mask(contexts), activations)
        with self._lock:
            self._records[shard] = record
        if self.window is not None and self.window.is_passed(shard, self.heldout_shards):
            self.window.drop(record)  # training passed it while it was being written
        return record

    def finalize(self) -> dict[str, Any]:
        """Write ``_COMPLETE.json`` and return its content: shards, contexts, tokens, digest, statistics per hook.

        Raises GranaryError where shards are missing. Calling it again changes nothing.
        """
        missing = self.pending()
        if missing:
            raise GranaryError(
                f"{len(missing)} of {self.num_shards} shards of {self.url} are missing, the first is {missing[0]}: "
                "run the same harvest again"
            )
        records = self.committed()
        summary = {
            "shards": len(records),
            "contexts": sum(record.num_contexts for record in records.values()),
            "tokens": sum(record.num_tokens for record in records.values()),
            "bytes": sum(record.num_bytes for record in records.values()),
            "heldout_shards": sorted(self.heldout_shards),
            "digest": self.digest(),
            "statistics": {hook: self.statistics(hook).summary() for hook in self.plan.hooks},
        }
        put_same(self.io, layout.COMPLETE, seal(summary), replace=len(self.extents) > 1)
        self.sweep()
        return summary

    @property
    def complete(self) -> bool:
        """True where the harvest has finished."""
        return self.io.size(layout.COMPLETE) is not None and self.summary()["shards"] == self.num_shards

    def summary(self) -> dict[str, Any]:
        """Content of ``_COMPLETE.json``; raises ObjectMissingError before `finalize`."""
        data = self.io.get(layout.COMPLETE)
        with reading(layout.COMPLETE):
            summary = unseal(data, layout.COMPLETE)
            if summary["shards"] not in range(self.num_shards + 1):
                raise ValueError(f"it counts {summary['shards']} shards")
            return summary

    def sweep(self) -> list[str]:
        """Remove the temporary files of writers that no longer live; returns their keys."""
        leftovers = self.io.leftovers()
        for key in leftovers:
            self.io.delete(key)
        return leftovers

    # Reading it

    def committed(self) -> dict[int, ShardRecord]:
        """Commit records by shard, ascending, from a fresh listing."""
        found_shards = map(layout.shard_of_manifest, self.io.listing("manifest"))
        shards = sorted(shard for shard in found_shards if shard is not None)
        with self._lock:
            unknown = [shard for shard in shards if shard not in self._records]
        found = on_threads(self._load_record, unknown)
        with self._lock:
            self._records.update(zip(unknown, found, strict=True))
            self._records = {shard: self._records[shard] for shard in shards}
            return dict(self._records)

    def passed_shards(self) -> frozenset[int]:
        """Shards whose activations training has passed and deleted; empty without a window."""
        return frozenset() if self.window is None else self.window.passed_shards(self.heldout_shards)

    def release(self, block: int) -> None:
        """Training is done with a block of the window: delete its activations, and let the harvest go on."""
        if self.window is None or self.window.is_freed(block):
            return
        shards = set(self.window.plan.shards(block)) - self.heldout_shards
        self.window.release(block, lambda: [one for shard, one in self.committed().items() if shard in shards])

    def contexts(self, split: Split) -> npt.NDArray[np.int64]:
        """Indices of committed contexts of a split, ascending; those that a window has deleted are in none."""
        if split not in ("train", "heldout", "all"):
            raise GranaryError(f"split {split!r} is not known: choose from train, heldout, all")
        heldout, passed = self.heldout_shards, self.passed_shards()
        chosen = [
            np.arange(record.first_context, record.first_context + record.num_contexts)
            for shard, record in self.committed().items()
            if shard not in passed and (split == "all" or (shard in heldout) == (split == "heldout"))
        ]
        return np.concatenate([np.empty(0, np.int64), *chosen])

    def tokens(self, contexts: Iterable[int]) -> npt.NDArray[np.int32]:
        """Token ids [n, T]."""
        return self.token_rows(layout.TOKENS, contexts)

    def mask(self, contexts: Iterable[int]) -> npt.NDArray[np.bool_]:
        """True where a position may be trained on, [n, T]."""
        return self.token_rows(layout.MASK, contexts)

    def segments(self, contexts: Iterable[int]) -> npt.NDArray[np.int32]:
        """Document index within the context, [n, T]."""
        return self.token_rows(layout.SEGMENTS, contexts)

    def read_context(
        self, hook: str, context: int, out: torch.Tensor | None = None, *, verify: bool = True
    ) -> torch.Tensor:
        """Activations [T, D] of one context, `read_dtype`, straight into `out` where given (contiguous, on the CPU).

        Every chunk is compared with the checksum in the commit record unless `verify` is False. Raises
        DamagedObjectError (a GranaryError with ``.shard``) naming shard and object where they differ.
        """
        holder = self._holder(hook)
        if holder is not self:
            return holder.read_context(hook, context, out, verify=verify)
        shape = (self.seq_len, self.plan.hooks[hook])
        if out is None:
            out = empty_to_read(shape, self.read_dtype)
        elif tuple(out.shape) != shape or out.dtype != self.read_dtype or not out.is_contiguous():
            raise read_dtype_error(hook, out, shape, self.read_dtype)
        record = self._record(self.shard_of(int(context)))
        try:
            self._reader.read(hook, record, int(context), out, verify)
        except DamagedObjectError as error:
            if record.shard in self.passed_shards():
                raise GranaryError(
                    f"shard {record.shard} of {self.url} is gone: training has passed it and deleted it (store.window)"
                ) from error
            raise
        return out

    def statistics(self, hook: str, shards: Iterable[int] | None = None) -> HookStatistics:
        """Mean, variance and norms over the trainable positions of `shards` (default: the committed training shards).

        Merged in shard order, so the result does not depend on who wrote what when.
        """
        holder = self._holder(hook)
        if shards is None:
            shards = [shard for shard in self.committed() if shard not in self.heldout_shards]
        if holder is not self:
            return holder.statistics(hook, shards)
        records = [self._record(shard) for shard in sorted(shards)]
        if not records:
            raise GranaryError(f"the store at {self.url} has no committed training shard yet")
        d_model = self.plan.hooks[hook]

        def load(record: ShardRecord) -> RowStatistics:
            mean, m2 = read_moments(self.io, record, hook, d_model)
            norms = record.norms[hook]
            return RowStatistics(Moments(norms.count, mean, m2), norms)

        return HookStatistics.from_rows(merge_rows(on_threads(load, records), d_model))

    def digest(self, shards: Iterable[int] | None = None) -> str:
        """SHA-256 over the commit records of `shards` (default: all committed), in shard order."""
        chosen = sorted(self.committed() if shards is None else shards)
        digest = hashlib.sha256(self.plan.hash().encode())
        for shard in chosen:
            digest.update(f"{shard}:{self._record(shard).crc:08x}\n".encode())
        return digest.hexdigest()

    def _writer(self, extent: Extent) -> ShardWriter:
        with self._lock:
            if extent.first_shard not in self._writers:
                self._writers[extent.first_shard] = ShardWriter(self.io, extent.plan)
            return self._writers[extent.first_shard]

    def _load_record(self, shard: int) -> ShardRecord:
        key = layout.manifest_key(shard)
        try:
            record = ShardRecord.from_bytes(self.io.get(key), key)
            record.check(self.extent_of(shard).plan, shard, self.shard_contexts(shard), key)
        except DamagedObjectError as error:
            raise DamagedObjectError(f"{self.url}: {error}", key=key, shard=shard) from error
        return record

    def _record(self, shard: int) -> ShardRecord:
        with self._lock:
            record = self._records.get(shard)
        if record is None:
            if self.io.size(layout.manifest_key(shard)) is None:
                raise GranaryError(f"shard {shard} of {self.url} is not committed yet: let the harvest reach it")
            record = self._load_record(shard)
            with self._lock:
                self._records[shard] = record
        return record

    def token_rows(self, name: str, contexts: Iterable[int]) -> npt.NDArray[Any]:
        """Rows of an array that was written before any activation, [n, T, ...]."""
        return read_token_contexts(self.io, self.plan, name, contexts, self.shard_of)
