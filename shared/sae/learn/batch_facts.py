"""What the losses must know of the whole batch before the first backward: BatchTopK's picks, tanh_quad's frequencies.

A batch may lie in several micro-batches and on several ranks; the answer does not depend on how it is cut.
Shapes: N rows of a micro-batch, D_in width of what is read, F latents held here, M candidates per row, P values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.sae.activations import Encoder
from shared.sae.contexts import Given
from shared.sae.groups import LatentGroup
from shared.sae.learn.inputs import BatchFacts

Reduce = Callable[[Tensor], object]
"""Sums a tensor over all ranks, in place."""

# A search begins at this share of the last threshold: low enough that it seldom has to be repeated.
MARGIN = 0.8
BITS_PER_ROUND = 8


@dataclass(slots=True)
class SelectionMemory:
    """Where the next search for the batch's threshold may begin: saves time, does not change the result."""

    lower_bound: float | None = None


def alone(tensor: Tensor) -> None:
    """The reduction of a single process."""


def frequencies(
    group: LatentGroup,
    centred: Sequence[Given],
    num_tokens: int,
    strength: Callable[[Tensor], Tensor],
    reduce_rows: Reduce,
) -> list[BatchFacts]:
    """The batch's mean of ``strength(z)`` [N, F] per latent, the same for every micro-batch."""
    sums_F = torch.zeros_like(group.b_enc)
    for part in centred:
        sums_F += strength(group.preactivations(part)).sum(0)
    reduce_rows(sums_F)
    return [BatchFacts(frequency=sums_F / num_tokens) for _ in centred]


def select_over_batch(
    encoders: Sequence[Encoder],
    centred: Sequence[Sequence[Given]],
    *,
    wanted: int,
    most: int,
    memory: SelectionMemory,
    first_guess: Tensor,
    reduce: Reduce,
) -> list[list[BatchFacts]]:
    """The pairs with the `wanted` largest values of the batch, and with the `most` largest, for Multi-TopK.

    Over the latents of all `encoders`; `centred` are the inputs of each, one tensor per micro-batch, and so are the
    facts that are returned. `first_guess` is a threshold to begin the search from where `memory` has none yet.
    """
    lower = MARGIN * float(first_guess) if memory.lower_bound is None else memory.lower_bound
    while True:
        found = [
            [encoder.above(part, lower) for part in parts] for encoder, parts in zip(encoders, centred, strict=True)
        ]
        # Behind the pairs of a row there are zeros.
        values_P = torch.cat([values.flatten() for parts in found for values, _ in parts])
        total = (values_P > 0).sum()
        reduce(total)
        if lower == 0 or int(total) >= most:
            break
        lower = lower / 2 if lower > 1e-6 else 0.0
    least = kth_largest(values_P, wanted, reduce)
    least_multi = least if most == wanted else kth_largest(values_P, most, reduce)
    memory.lower_bound = MARGIN * float(least_multi)
    return [[_kept(*part, least, least_multi) for part in parts] for parts in found]


def _kept(values: Tensor, indices: Tensor, least: Tensor, least_multi: Tensor) -> BatchFacts:
    """Candidates in descending order, so that what is kept comes first, without the columns behind."""
    width = int(((indices >= 0) & (values >= least_multi)).sum(1).max()) if len(values) else 0
    return BatchFacts(values[:, : max(1, width)], indices[:, : max(1, width)], least, least_multi)


def kth_largest(values_P: Tensor, k: int, reduce: Reduce = alone) -> Tensor:
    """The k-th largest of all ranks' positive values, a scalar; 0 when there are fewer.

    Exact, by radix: positive floats are ordered as their bits are. The ranks exchange 256 counts per round. On a GPU
    nothing is read on the host; elsewhere a round looks only at what the one before left.
    """
    integer = {4: torch.int32, 8: torch.int64}[values_P.element_size()]
    bits_P, alive_P = values_P.view(integer), values_P > 0
    total = alive_P.sum()
    reduce(total)
    size, prefix = 1 << BITS_PER_ROUND, total.new_zeros(1)
    left = torch.full_like(prefix, k)
    for shift in range(8 * values_P.element_size() - BITS_PER_ROUND, -1, -BITS_PER_ROUND):
        if not values_P.is_cuda:
            bits_P = bits_P[alive_P]
            alive_P = torch.ones_like(bits_P, dtype=torch.bool)
        digits_P = (bits_P >> shift) & (size - 1)
        counts = prefix.new_zeros(size).index_add_(0, digits_P, alive_P.long())
        reduce(counts)
        above = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = ((above >= left).sum(0, keepdim=True) - 1).clamp_min(0)
        left -= above.gather(0, digit) - counts.gather(0, digit)
        prefix = prefix << BITS_PER_ROUND | digit
        alive_P &= digits_P == digit
    return torch.where(total < k, 0, prefix[0]).to(integer).view(values_P.dtype)
