"""Which latents of all layers fire on the tokens of a sample of a store, and how often two of them together.

Shapes: N tokens of the sample, P firings of a layer, F latents of a layer, E firings of a block's latents.
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

TERMS = 1 << 20
"""Pairs of firings that are looked at together."""


@dataclass(frozen=True, slots=True)
class Firing:
    """What of one layer fires on each token: P firings, token by token."""

    latent_P: Tensor
    """int32."""
    value_P: Tensor
    """float32."""
    first_N: Tensor
    """int64 [N + 1]: token n has the firings first_N[n] to first_N[n + 1]."""
    token_P: Tensor
    """int32."""
    order_P: Tensor
    """int64: the firings by latent, and within a latent by token."""
    ends: Tensor
    """int64 [F + 1]: latent f has the entries ends[f] to ends[f + 1] of `order_P`."""

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor, Tensor]], num_latents: int) -> "Firing":
        """Make it from what `unpadded` gives of some tokens after others."""
        latent_P, value_P, count_N = (torch.cat(columns) for columns in zip(*parts, strict=True))
        tokens = torch.arange(len(count_N), dtype=torch.int32, device=count_N.device)
        counts = torch.bincount(latent_P.long(), minlength=num_latents)
        return cls(
            latent_P,
            value_P,
            _before(count_N),
            torch.repeat_interleave(tokens, count_N),
            torch.argsort(latent_P, stable=True),
            _before(counts),
        )

    @property
    def fired(self) -> Tensor:
        """int64 [F]: tokens on which each latent fires."""
        return self.ends.diff()

    def of_block(self, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return each firing of latents start to stop of `block`: row within the block, token and value, [E] each."""
        some_E = self.order_P[int(self.ends[block.start]) : int(self.ends[block.stop])]
        return self.latent_P[some_E].long() - block.start, self.token_P[some_E].long(), self.value_P[some_E].double()

    def on(self, token_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All firings of some tokens: which of the tokens each is of, its latent and its value."""
        count_E = self.first_N[token_E + 1] - self.first_N[token_E]
        owner = torch.repeat_interleave(torch.arange(len(token_E), device=token_E.device), count_E)
        skipped_E = self.first_N[token_E] - _before(count_E)[:-1]
        at = torch.arange(len(owner), device=token_E.device) + skipped_E[owner]
        return owner, self.latent_P[at].long(), self.value_P[at].double()


def unpadded(indices_NK: Tensor, values_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents and values of what fires, token by token, and how many fire on each; index -1 is padding."""
    fires_NK = indices_NK >= 0
    return indices_NK[fires_NK].int(), values_NK[fires_NK].float(), fires_NK.sum(1)


def _before(count: Tensor) -> Tensor:
    """Sums of all counts before each, and of all, [n + 1]."""
    return torch.nn.functional.pad(torch.cumsum(count, 0), (1, 0))


@dataclass(frozen=True, slots=True)
class Together:
    """How a block of targets fires with all sources of a layer: [B, F] each, float64 sums over the sample."""

    both: Tensor
    """Tokens on which both fire."""
    source_sum: Tensor
    """The source's activation on tokens on which the target fires."""
    product: Tensor
    """The product of both activations."""

    @classmethod
    def count(cls, target: Firing, block: slice, source: Firing) -> "Together":
        """Count in the order of tokens, some pairs at a time."""
        rows, F = block.stop - block.start, len(source.ends) - 1
        both, source_sum, product = (
            torch.zeros(rows * F, dtype=torch.float64, device=target.ends.device) for _ in range(3)
        )
        row_E, token_E, value_E = target.of_block(block)
        mean = max(1, len(source.latent_P) // (len(source.first_N) - 1))
        for start in range(0, len(row_E), max(1, TERMS // mean)):
            some = slice(start, start + max(1, TERMS // mean))
            owner, other, other_value = source.on(token_E[some])
            cell = row_E[some][owner] * F + other
            add_at(both, cell, torch.ones_like(other_value))
            add_at(source_sum, cell, other_value)
            add_at(product, cell, value_E[some][owner] * other_value)
        return cls(both.view(rows, F), source_sum.view(rows, F), product.view(rows, F))


@torch.no_grad()
def firing(
    store: Store, sources: Sequence[Source], contexts: npt.NDArray[np.int64], seen: Callable[[int], object]
) -> tuple[dict[int, Firing], int]:
    """Find that of every layer that a dictionary reads, over the trainable tokens of `contexts`, and their number.

    One dictionary at a time is in memory. `seen` is told of each context that a dictionary has read.
    """
    found: dict[int, Firing] = {}
    masks = [np.flatnonzero(store.mask([context])[0]) for context in contexts.tolist()]
    for source in sources:
        dictionary = source.open()
        names = tuple(str(place.read) for place in source.places)
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in names]
        reads = read_ahead(store, ((int(context), names) for context in contexts))
        for rows, read in zip(masks, reads, strict=True):
            x_ND = side_by_side(read, names)[torch.from_numpy(rows)].to(dictionary.b_dec.device)
            picks = dictionary.encode(x_ND)
            for part, (values_NK, indices_NK) in zip(parts, dictionary.split(picks.values, picks.indices), strict=True):
                part.append(unpadded(indices_NK, values_NK))
            seen(store.seq_len)
        for place, group in zip(source.places, dictionary.groups, strict=True):
            found[place.own.layer] = Firing.of(parts.pop(0), group.num_latents)  # its parts are freed behind it
        del dictionary
    return found, sum(map(len, masks))
