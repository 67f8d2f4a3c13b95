"""What the runs of a job read: the tokens that were chosen before anything is claimed, and the inputs once it is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.basics.config import TokenKind
from shared.basics.errors import GranaryError
from shared.basics.units import GIB
from shared.parallel import World, barrier
from shared.sae.contexts import Contexts, Given
from shared.sae.sites import Sites, Unit, side_by_side
from shared.store import HookStatistics
from stage_train.config import BufferPlace, OnDamage, TrainSchema
from stage_train.data.blocks import WindowReader, windowed
from stage_train.data.kinds import kind_statistics, restrict_kinds
from stage_train.data.outliers import DroppedRows, drop_outliers, norm_bounds
from stage_train.data.sites import site_formats
from stage_train.data.stores import PinnedStore, combined_statistics
from stage_train.data.stream import ContextOrder, ContextStream, Order, StreamOrder, TokenStream, TrainingData
from stage_train.data.stream.sample import Formats, sample_contexts, sample_tokens

# Tokens that the initialisation looks at.
SAMPLE_TOKENS = 8192


def seed_of(cfg: TrainSchema) -> int:
    """That of the order."""
    return cfg.seed if cfg.stream.seed is None else cfg.stream.seed


def order_of(cfg: TrainSchema) -> StreamOrder:
    """The order of tokens that a configuration asks for."""
    return StreamOrder(
        batch_size=cfg.stream.batch_size,
        seed=seed_of(cfg),
        lanes=cfg.stream.lanes,
        mix_contexts=cfg.stream.mix_contexts,
        drop_last=cfg.stream.drop_last,
    )


def order_for(cfg: TrainSchema, unit: Unit, seq_len: int) -> Order:
    """The order of what dictionaries of a `unit` learn from, of contexts of `seq_len` positions."""
    if unit == "token":
        return order_of(cfg)
    return ContextOrder(
        batch_size=cfg.stream.batch_size, seq_len=seq_len, seed=seed_of(cfg), drop_last=cfg.stream.drop_last
    )


def stream_in(order: Order, data: TrainingData, formats: Formats, **options: Any) -> TokenStream | ContextStream:
    """The stream of that order; `options` as either takes them."""
    if isinstance(order, ContextOrder):
        return ContextStream(data, formats, order, **options)
    assert isinstance(order, StreamOrder)
    return TokenStream(data, formats, order, **options)


def unit_of(sites: Sequence[Sites]) -> Unit:
    """What one row of all these dictionaries' input is. Raises GranaryError where they do not agree."""
    units = {one.unit: one for one in sites}
    if len(units) > 1:
        raise GranaryError(
            f"packed runs read one stream: {units['sequence']} is learnt from whole contexts and {units['token']} from "
            "shuffled tokens: train them one after the other"
        )
    return sites[0].unit


def skips_damaged(cfg: TrainSchema) -> bool:
    """Whether contexts that cannot be read are left out."""
    return cfg.stream.on_damage is OnDamage.skip


def mixes_on_gpu(place: BufferPlace, size: int, free: float) -> bool:
    """Whether contexts of `size` bytes are mixed on a GPU with `free` bytes: where asked, or where they fit easily."""
    return place is BufferPlace.device or (place is BufferPlace.auto and size <= free // 4)


@dataclass(frozen=True)
class PinnedTokens:
    """The tokens of the pinned stores that are trained on. Choosing them reads, and changes nothing on disk."""

    stores: tuple[PinnedStore, ...]
    data: TrainingData
    blocks: WindowReader | None
    """Where the store has a window."""
    dropped: tuple[DroppedRows, ...] | None
    """Outliers, per store; None where none are looked for."""
    unit: Unit = "token"
    """Of what is trained: shuffled tokens, or whole contexts."""
    kinds: tuple[TokenKind, ...] | None = None
    """Which tokens are trained on; None: all trainable ones."""

    @classmethod
    def choose(cls, cfg: TrainSchema, stores: Sequence[PinnedStore], sites: Sequence[Sites], world: World) -> Self:
        """All trainable tokens but the outliers. Raises GranaryError for what can't be read, or not in this way."""
        multiple, unit = cfg.stream.max_norm_multiple, unit_of(sites)
        blocks = windowed(stores, multiple)
        data, kinds = TrainingData([part.slice for part in stores], blocks), cfg.stream.kinds
        restrict_kinds(data, stores, kinds)
        if multiple is None:
            return cls(tuple(stores), data, blocks, None, unit, None if kinds is None else tuple(kinds))
        if kinds is not None:
            raise GranaryError(
                "stream.max_norm_multiple bounds norms of all kinds together: leave it or stream.kinds out"
            )
        sides = list(dict.fromkeys(one.reads for one in sites))
        if len(sides) > 1:
            raise GranaryError(
                f"stream.max_norm_multiple={multiple} drops other tokens at {' and at '.join(map(', '.join, sides))}: "
                "train these hooks one after the other, or set it to null"
            )
        names = list(dict.fromkeys(name for one in sites for name in one.names))
        bounds = norm_bounds(stores, sides[0], multiple)
        dropped = drop_outliers(data, stores, bounds, names, world, skip_damaged=skips_damaged(cfg))
        return cls(tuple(stores), data, blocks, tuple(dropped), unit)

    def statistics(self, site: str) -> HookStatistics:
        """Return those of the tokens that training reads; with a window, of the first block's."""
        if self.kinds is not None:
            return combined_statistics(self.stores, [kind_statistics(part, self.kinds, site) for part in self.stores])
        parts = [part.store.statistics(site, part.measured_shards) for part in self.stores]
        if self.dropped is not None:
            parts = [rows.taken_from(site, whole) for rows, whole in zip(self.dropped, parts, strict=True)]
        return combined_statistics(self.stores, parts)


class RunInputs(Protocol):
    """What a run asks of the activations that it learns from, beside batches."""

    def statistics(self, site: str) -> HookStatistics:
        """Return those of the tokens that training reads."""

    def sample(self, sites: Sites, seed: int) -> tuple[Given, Tensor]:
        """A few thousand tokens: x [M, d_in], or whole contexts in which M count, and y [M, d_out], float32; row i is
        the same token in both."""

    def records(self) -> list[dict[str, Any]]:
        """Return what a checkpoint holds of each store."""

    def origin(self) -> dict[str, Any]:
        """Where the activations are from: model, length of a context, stores."""


class TrainingInputs:
    """The activations of some sites as the groups ``store`` and ``stream`` of a configuration describe them."""

    def __init__(self, cfg: TrainSchema, world: World, tokens: PinnedTokens, names: Iterable[str]) -> None:
        """`names` are all sites that any run reads or writes. Raises GranaryError where statistics can't be read."""
        self.cfg, self.world = cfg, world
        self.stores, self.data, self.blocks = tokens.stores, tokens.data, tokens.blocks
        self.formats = site_formats(names, self.stores)
        """Width and the dtype that is read, of every site."""
        self.unit = tokens.unit
        self._statistics = {site: tokens.statistics(site) for site in self.formats}
        self._samples: dict[tuple[tuple[str, ...], int], dict[str, Tensor]] = {}
        self._contexts: dict[tuple[tuple[str, ...], int], tuple[dict[str, Tensor], NDArray[np.int64]]] = {}

    @classmethod
    def open(
        cls,
        cfg: TrainSchema,
        world: World,
        tokens: PinnedTokens,
        names: Iterable[str],
        *,
        claim: tuple[str, str],
        stream: Mapping[str, Any] | None,
    ) -> Self:
        """Claim a windowed store for `claim` (run id, folder), which goes on from the state `stream`, and wait for it.

        Raises GranaryError where another run reads the store, or what this one needs is deleted already.
        """
        if tokens.blocks is not None:
            if world.is_main:
                tokens.blocks.begin(*claim, stream)
            barrier()
            tokens.blocks.wait(0)
        return cls(cfg, world, tokens, names)

    def statistics(self, site: str) -> HookStatistics:
        """Return those of the tokens that training reads."""
        return self._statistics[site]

    def records(self) -> list[dict[str, Any]]:
        """Return what a checkpoint holds of each store."""
        return [part.record() for part in self.stores]

    def origin(self) -> dict[str, Any]:
        """Where the activations are from: model, length of a context, stores."""
        first = self.stores[0].store
        return {
            "model": first.plan.provenance.get("model"),
            "seq_len": first.seq_len,
            "stores": [part.record() | {"shards": len(part.shards)} for part in self.stores],
        }

    def sample(self, sites: Sites, seed: int) -> tuple[Given, Tensor]:
        """A few thousand tokens: x [M, d_in], or whole contexts in which M count, and y [M, d_out], float32; row i is
        the same token in both.

        The sites of a side lie side by side; for an autoencoder y is x itself. What is read is kept until
        `forget_samples`.
        """
        key = sites.names, seed
        formats, skip = {name: self.formats[name] for name in sites.names}, skips_damaged(self.cfg)
        if sites.unit == "token":
            if key not in self._samples:
                self._samples[key] = sample_tokens(self.data, formats, SAMPLE_TOKENS, seed, skip_damaged=skip)
            return sites.pick(self._samples[key])
        if key not in self._contexts:
            self._contexts[key] = sample_contexts(self.data, formats, SAMPLE_TOKENS, seed, skip_damaged=skip)
        activations, rows = self._contexts[key]
        documents_CT, counts_CT = self.data.documents.of(rows), torch.from_numpy(self.data.mask_of(rows))
        x = Contexts.of(side_by_side(activations, sites.reads), documents_CT, counts_CT)
        return x, x.counted(side_by_side(activations, sites.writes))

    def forget_samples(self) -> None:
        """Free their memory, when all runs have their first weights."""
        self._samples.clear()
        self._contexts.clear()

    def open_stream(self, rank: int, world: int, end: tuple[int, int]) -> TokenStream | ContextStream:
        """The batches of share `rank` of `world` shares, up to (epoch, batch) `end`."""
        order = order_for(self.cfg, self.unit, self.data.seq_len)
        options: Any = {
            "rank": rank,
            "world": world,
            "device": self.world.device,
            "io_threads": self.cfg.stream.io_threads,
            "prefetch_bytes": int(self.cfg.stream.prefetch_gib * GIB),
            "pool_device": self._pool_device(order, world),
            "skip_damaged": skips_damaged(self.cfg),
        }
        stream = stream_in(order, self.data, self.formats, **options)
        stream.stop_at(*end)
        return stream

    def _pool_device(self, order: Order, stream_world: int) -> torch.device:
        """Where contexts are mixed: on the GPU where it is asked for, or where they fit easily."""
        place, device = self.cfg.stream.buffer, self.world.device
        if place is BufferPlace.device and device.type != "cuda":
            raise GranaryError(f"stream.buffer=device needs a GPU, the device is {device.type}: use auto or host")
        if device.type != "cuda" or place is BufferPlace.host:
            return torch.device("cpu")
        context_bytes = self.data.seq_len * sum(width * dtype.itemsize for width, dtype in self.formats.values())
        most = context_bytes * order.contexts_held // stream_world
        most += int(self.cfg.stream.prefetch_gib * GIB) // stream_world
        free, _ = torch.cuda.mem_get_info(device)
        return device if mixes_on_gpu(place, most, free) else torch.device("cpu")
