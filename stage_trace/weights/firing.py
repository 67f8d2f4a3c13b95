"""Which latents of all layers fire on the tokens of a sample of a store, and how often two of them together.

Shapes: N tokens of the sample, K slots of a layer, F latents of a layer, E firings of a block's latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.kernels.add_at import add_at
from shared.sae.sites import side_by_side
from shared.store import Store
from shared.store.ahead import read_ahead
from stage_trace.session import Source

TERMS = 1 << 21
"""Pairs of firings that are looked at together."""


@dataclass(frozen=True, slots=True)
class Firing:
    """What of one layer fires on each token."""

    indices_NK: Tensor
    """int32; -1 is padding."""
    values_NK: Tensor
    """float32."""
    order: Tensor
    """Slots of the table, flat, by latent and within a latent by token; padding first."""
    ends: Tensor
    """int64 [F + 1]: latent f has the entries ends[f] to ends[f + 1] of `order`."""

    @classmethod
    def of(cls, indices_NK: Tensor, values_NK: Tensor, num_latents: int) -> "Firing":
        """Sorted by latent."""
        flat = indices_NK.flatten()
        counts = torch.bincount(flat.long() + 1, minlength=num_latents + 1)
        return cls(indices_NK, values_NK, torch.argsort(flat, stable=True), torch.cumsum(counts, 0))

    @property
    def fired(self) -> Tensor:
        """int64 [F]: tokens on which each latent fires."""
        return self.ends.diff()

    def of_block(self, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of latents start to stop of `block`: row within the block, token and value of each firing, [E] each."""
        entries = self.order[int(self.ends[block.start]) : int(self.ends[block.stop])]
        row_E = self.indices_NK.flatten()[entries].long() - block.start
        return row_E, entries // self.indices_NK.shape[1], self.values_NK.flatten()[entries]


@dataclass(frozen=True, slots=True)
class Together:
    """Of the latents of a block of targets and all sources of a layer, [B, F] each, float64 sums over the sample."""

    both: Tensor
    """Tokens on which both fire."""
    source_sum: Tensor
    """The source's activation on tokens on which the target fires."""
    product: Tensor
    """The product of both activations."""

    @classmethod
    def count(cls, target: Firing, block: slice, source: Firing) -> "Together":
        """In the order of tokens, some pairs at a time."""
        rows, F = block.stop - block.start, len(source.ends) - 1
        both, source_sum, product = (target.values_NK.new_zeros(rows * F, dtype=torch.float64) for _ in range(3))
        row_E, token_E, value_E = target.of_block(block)
        at_once = max(1, TERMS // max(1, source.indices_NK.shape[1]))
        for start in range(0, len(row_E), at_once):
            some = slice(start, start + at_once)
            other_EK = source.indices_NK[token_E[some]].long()
            fires_EK = other_EK >= 0
            cell = (row_E[some, None] * F + other_EK)[fires_EK]
            other_value = source.values_NK[token_E[some]].double()
            add_at(both, cell, torch.ones_like(cell, dtype=torch.float64))
            add_at(source_sum, cell, other_value[fires_EK])
            add_at(product, cell, (value_E[some, None].double() * other_value)[fires_EK])
        return cls(both.view(rows, F), source_sum.view(rows, F), product.view(rows, F))


@torch.no_grad()
def firing(
    store: Store, sources: Sequence[Source], contexts: npt.NDArray[np.int64], seen: Callable[[int], object]
) -> tuple[dict[int, Firing], int]:
    """Of every layer that a dictionary reads, over the trainable tokens of `contexts`, and how many these are.

    One dictionary at a time is in memory. `seen` is told of each context that a dictionary has read.
    """
    found: dict[int, Firing] = {}
    masks = [np.flatnonzero(store.mask([context])[0]) for context in contexts.tolist()]
    for source in sources:
        dictionary = source.open()
        names = tuple(str(place.read) for place in source.places)
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in names]
        reads = read_ahead(store, ((int(context), names) for context in contexts))
        for rows, read in zip(masks, reads, strict=True):
            x_ND = side_by_side(read, names)[torch.from_numpy(rows)].to(dictionary.b_dec.device)
            picks = dictionary.encode(x_ND)
            for part, (values_NK, indices_NK) in zip(parts, dictionary.split(picks.values, picks.indices), strict=True):
                part.append((values_NK.float(), indices_NK.int()))
            seen(store.seq_len)
        for place, part, group in zip(source.places, parts, dictionary.groups, strict=True):
            width = max(1, *(indices_NK.shape[1] for _, indices_NK in part))
            found[place.layers[0]] = Firing.of(
                _side_padded([indices_NK for _, indices_NK in part], width, -1),
                _side_padded([values_NK for values_NK, _ in part], width, 0),
                group.num_latents,
            )
        del dictionary
    return found, sum(map(len, masks))


def _side_padded(tables: Sequence[Tensor], width: int, fill: int) -> Tensor:
    """One below the other, each filled up to `width` columns."""
    return torch.cat([torch.nn.functional.pad(one, (0, width - one.shape[1]), value=fill) for one in tables])
