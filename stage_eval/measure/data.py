"""The contexts to evaluate on: tokens and masks of the split, and the groups that its tokens belong to.

Legend: C evaluated contexts, B contexts of a unit, T positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.basics.config import Split, TokenKind
from shared.basics.errors import GranaryError
from shared.lm import segment_positions
from shared.parallel import World
from shared.sae.sites import Sites
from shared.store import Store, ahead
from shared.store.choose import choose_contexts
from stage_eval.measure.breakdown import Grouping, frequency_groups, position_groups, token_frequencies
from stage_eval.measure.downstream import Batch, scored_positions
from stage_eval.measure.sums import Rows

UNIT_TOKENS = 4096


@dataclass(frozen=True)
class EvaluationData:
    """Token-level material of the evaluated contexts, the same on every rank."""

    contexts: npt.NDArray[np.int64]
    """Indices into the store, [C]."""
    tokens_CT: Tensor
    """int64"""
    mask_CT: Tensor
    """bool: trainable positions."""
    bos_CT: Tensor
    """bool: BOS, padding excepted."""
    segments_CT: Tensor
    positions_CT: Tensor
    """Position as the model numbers it."""
    packing: str
    """Of the store: how its documents share a context."""
    position_groups: Grouping
    frequency_groups: Grouping
    frequency_V: npt.NDArray[np.float64]
    """Share of each token id among the trainable positions."""
    kind_CT: Tensor | None = None
    """uint8: what each position holds (see shared.store.format.image_table); None for a store of text alone."""

    @property
    def num_tokens(self) -> int:
        """Trainable positions."""
        return int(self.mask_CT.sum())

    def rows(self, start: int, chosen_BT: Tensor, label_offset: int = 0) -> Rows:
        """Groups of the chosen positions of the contexts from `start` on, in row order.

        `label_offset` 1 groups by the frequency of the next token instead of the position's own.
        """
        stop = start + len(chosen_BT)
        row_N, column_N = chosen_BT.nonzero(as_tuple=True)
        tokens_N = self.tokens_CT[start:stop][row_N, column_N + label_offset]
        return Rows(
            row_N + start,
            torch.from_numpy(self.position_groups(self.positions_CT[start:stop][chosen_BT].numpy())),
            torch.from_numpy(self.frequency_groups(self.frequency_V[tokens_N.numpy()])),
            None if self.kind_CT is None else self.kind_CT[start:stop][row_N, column_N].long(),
        )

    def batch(self, start: int, stop: int, splice_bos: bool) -> Batch:
        """Contexts [start, stop) as the model is to run them."""
        mask_BT, bos_BT = self.mask_CT[start:stop], self.bos_CT[start:stop]
        return Batch(
            tokens_BT=self.tokens_CT[start:stop],
            segments_BT=self.segments_CT[start:stop],
            packing=self.packing,
            replaced_BT=mask_BT | bos_BT if splice_bos else mask_BT & ~bos_BT,
            scored_BT=scored_positions(mask_BT & ~bos_BT, self.segments_CT[start:stop]),
        )


def load_data(
    store: Store, split: Split, limit: int | None, kinds: Sequence[TokenKind] | None = None
) -> EvaluationData:
    """Tokens of the split, at most `limit` contexts of it; of a store with images those of `kinds`, where given.

    Raises GranaryError where the split has no committed context or no trainable position.
    """
    contexts = choose_contexts(store, split, limit)
    tokens_CT, mask_CT, segments_CT = store.tokens(contexts), store.mask(contexts), store.segments(contexts)
    if kinds is not None:
        mask_CT &= store.pictures.chosen(contexts, [kind.value for kind in kinds])
    if not mask_CT.any():
        raise GranaryError(f"no trainable position in the {split.value} contexts of {store.url}: nothing to evaluate")
    bos = store.plan.provenance.get("tokenizer", {}).get("special_ids", {}).get("bos")
    bos_CT = (tokens_CT == bos) & (segments_CT >= 0) if bos is not None else np.zeros_like(mask_CT)
    segments = torch.from_numpy(segments_CT.astype(np.int64))
    positions_CT = segment_positions(segments) if store.isolated else torch.arange(store.seq_len).expand(segments.shape)
    return EvaluationData(
        contexts=contexts,
        tokens_CT=torch.from_numpy(tokens_CT.astype(np.int64)),
        mask_CT=torch.from_numpy(mask_CT),
        bos_CT=torch.from_numpy(bos_CT),
        segments_CT=segments,
        positions_CT=positions_CT,
        packing=store.plan.packing,
        position_groups=position_groups(store.seq_len),
        frequency_groups=frequency_groups(),
        frequency_V=token_frequencies(tokens_CT, mask_CT),
        kind_CT=torch.from_numpy(store.pictures.kind(contexts)) if store.plan.has_images else None,
    )


def units(num_contexts: int, unit_contexts: int, world: World) -> list[tuple[int, int]]:
    """This rank's [start, stop) ranges of evaluated contexts.

    The units are the same for every world size, so that each context meets the same neighbours in its batch and float
    sums come out the same; only who does which unit changes.
    """
    ranges = [(start, min(start + unit_contexts, num_contexts)) for start in range(0, num_contexts, unit_contexts)]
    return ranges[world.rank :: world.size]


def default_unit(seq_len: int) -> int:
    """Contexts that make `UNIT_TOKENS` tokens."""
    return max(1, UNIT_TOKENS // seq_len)


def read_ahead(
    store: Store, wanted: Sequence[Sites], data: EvaluationData, ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, Sites, dict[str, Tensor]]]:
    """Read what `wanted` names, for each context of the ranges in order; a few reads are in flight.

    Yields (evaluated context, sites, activations [T, D] of each of their names).
    """
    items = [(context, sites) for start, stop in ranges for context in range(start, stop) for sites in wanted]
    reads = ahead.read_ahead(store, ((int(data.contexts[context]), sites.names) for context, sites in items))
    for (context, sites), activations in zip(items, reads, strict=True):
        yield context, sites, activations
