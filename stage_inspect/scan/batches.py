"""Contexts of a part in batches: activations read ahead, encoded, and brought to the CPU as sparse latents.

B contexts of a batch, T positions, N of them trainable, K slots, D width of what the dictionary reads. Batches are the
same whoever asks for them: they hold whole contexts of one shard, so that float products meet the same neighbours.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.sae.contexts import Contexts, Given, as_attended, in_parts
from shared.sae.sites import Sites, side_by_side
from shared.sae.variants import Dictionary
from shared.store import Store
from shared.store.ahead import read_ahead
from stage_inspect.scan.pairs import Ints
from stage_inspect.scan.pictures import Shown
from stage_inspect.scan.places import Places

BATCH_TOKENS = 8192
ENCODE_ELEMENTS = 1 << 24  # rows times latents that are encoded at a time


@dataclass(frozen=True)
class Batch:
    """Whole contexts of one shard, and what fires in them."""

    places: Places
    at_N: Ints
    """Flat positions of the trainable tokens, ascending."""
    indices_NK: Ints
    values_NK: npt.NDArray[np.float32]
    is_heldout: bool
    shown: Shown | None
    """Which positions are regions of which pictures; None for a store of text alone."""


def given(
    read: Iterable[Mapping[str, Tensor]],
    sites: Sites,
    counts_BT: npt.NDArray[np.bool_],
    segments_BT: npt.NDArray[np.int32],
    *,
    isolated: bool,
) -> Given:
    """What the dictionary is given of contexts, one read after the other: the positions that count, as rows [N, D], or
    whole contexts of which they count."""
    x_TDs = (side_by_side(one, sites.reads) for one in read)
    if sites.unit == "token":
        rows = [torch.from_numpy(np.flatnonzero(counts_T)) for counts_T in counts_BT]
        return torch.cat([x_TD[own] for own, x_TD in zip(rows, x_TDs, strict=True)])
    segments = torch.from_numpy(segments_BT.astype(np.int64))
    return Contexts.of(torch.stack(list(x_TDs)), as_attended(segments, isolated=isolated), torch.from_numpy(counts_BT))


@dataclass(frozen=True)
class BatchReader:
    """Makes batches of a store's contexts."""

    store: Store
    dictionary: Dictionary
    sites: Sites
    window: int
    isolated: bool

    def batches(self, contexts: Ints) -> Iterator[Batch]:
        """Yield batches in the order of the contexts, which ascend."""
        units = self._units(contexts)
        reads = read_ahead(self.store, ((int(context), self.sites.reads) for unit in units for context in unit))
        for unit in units:
            tokens_BT, mask_BT, segments_BT = self.store.tokens(unit), self.store.mask(unit), self.store.segments(unit)
            places = Places.of(unit, tokens_BT, mask_BT, segments_BT, window=self.window, isolated=self.isolated)
            at_N = np.flatnonzero(places.trainable_P)
            trainable_BT = places.trainable_P.reshape(len(unit), -1)
            x = given((next(reads) for _ in unit), self.sites, trainable_BT, segments_BT, isolated=self.isolated)
            indices_NK, values_NK = self.encode(x)
            is_heldout = self.store.shard_of(int(unit[0])) in self.store.heldout_shards
            yield Batch(places, at_N, indices_NK, values_NK, is_heldout, Shown.of(self.store, unit, places))

    @torch.inference_mode()
    def encode(self, x: Given) -> tuple[Ints, npt.NDArray[np.float32]]:
        """Indices and values [N, K] of raw activations, [N, D] or whole contexts of which N count; -1 is padding."""
        device = self.dictionary.b_dec.device
        rows = max(1, ENCODE_ELEMENTS // self.dictionary.config.d_latent)
        pieces: list[Any] = [piece.to(device) for piece, _ in in_parts(x, rows) if len(piece)]
        parts = [self.dictionary.encode(piece) for piece in pieces]
        width = max((part.indices.shape[-1] for part in parts), default=0)
        indices_NK = np.full((len(x), width), -1, np.int64)
        values_NK = np.zeros((len(x), width), np.float32)
        start = 0
        for part in parts:
            stop, slots = start + part.indices.shape[0], part.indices.shape[-1]
            indices_NK[start:stop, :slots] = part.indices.cpu().numpy()
            values_NK[start:stop, :slots] = part.values.float().cpu().numpy()
            start = stop
        return indices_NK, values_NK

    def _units(self, contexts: Ints) -> list[Ints]:
        """Contexts of a batch: of one shard, about `BATCH_TOKENS` tokens."""
        size = max(1, BATCH_TOKENS // self.store.seq_len)
        shard = contexts // self.store.plan.shard_contexts
        of_shards = np.split(contexts, np.flatnonzero(np.diff(shard)) + 1)
        return [one[start : start + size] for one in of_shards for start in range(0, len(one), size)]
