"""What the losses must know of the whole batch before the first backward: BatchTopK's picks, tanh_quad's frequencies.

A batch may lie in several micro-batches and on several ranks; the answer does not depend on how it is cut.
Shapes: N rows of a micro-batch, D d_model, F latents held here, M candidates per row, P values.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.kernels import product
from shared.sae.activations import BatchTopK, encode_above
from shared.sae.latents import Survey
from shared.sae.losses import saturated

if TYPE_CHECKING:
    from shared.sae.model import SAE

Reduce = Callable[[Tensor], object]
"""Sums a tensor over all ranks, in place."""

# A search begins at this share of the last threshold: low enough that it seldom has to be repeated.
MARGIN = 0.8
BITS_PER_ROUND = 8


def alone(tensor: Tensor) -> None:
    """The reduction of a single process."""


def needs_survey(sae: "SAE", *, cut: bool) -> bool:
    """Whether losses need it: always for BatchTopK, for tanh_quad when the batch is `cut` into parts."""
    return sae.config.activation == "batchtopk" or (sae.config.penalty == "tanh_quad" and cut)


@torch.no_grad()
def survey(
    sae: "SAE",
    parts: Sequence[Tensor],
    num_tokens: int,
    *,
    k: int | None = None,
    reduce_all: Reduce = alone,
    reduce_rows: Reduce = alone,
) -> list[Survey]:
    """One entry per micro-batch of this rank, `parts` of raw activations [N, D]; `num_tokens` is the whole batch's.

    `reduce_all` sums over all ranks, `reduce_rows` over those that hold the same latents; all call it together. `k`
    overrides the config's.
    """
    inputs = [sae.encoder_input(part)[0] for part in parts]
    if sae.config.activation == "batchtopk":
        return _survey_batchtopk(sae, inputs, num_tokens, sae.config.k if k is None else k, reduce_all)
    sums_F = torch.zeros_like(sae.b_enc)
    for centred_ND in inputs:
        z_NF = product(centred_ND, sae.W_enc.T, sae.b_enc, compute=sae.compute)
        sums_F += saturated(sae.activation.dense(z_NF, sae.b_enc), sae.config, sae.decoder_norm()).sum(0)
    reduce_rows(sums_F)
    return [Survey(frequency=sums_F / num_tokens) for _ in inputs]


def _survey_batchtopk(
    sae: "SAE", inputs: Sequence[Tensor], num_tokens: int, k: int | None, reduce: Reduce
) -> list[Survey]:
    config, activation = sae.config, sae.activation
    assert isinstance(activation, BatchTopK)
    assert k is not None
    wanted = num_tokens * min(k, config.d_latent)
    most = num_tokens * min(k * config.multi_topk_factor, config.d_latent) if config.multi_topk_weight > 0 else wanted
    lower = MARGIN * float(activation.threshold) if activation.lower_bound is None else activation.lower_bound
    while True:
        found = [encode_above(sae, centred_ND, lower) for centred_ND in inputs]
        values_P = torch.cat([values[indices >= 0] for values, indices in found])
        total = torch.tensor(len(values_P), device=values_P.device)
        reduce(total)
        if lower == 0 or int(total) >= most:
            break
        lower = lower / 2 if lower > 1e-6 else 0.0
    least = kth_largest(values_P, wanted, reduce)
    least_multi = least if most == wanted else kth_largest(values_P, most, reduce)
    activation.lower_bound = MARGIN * float(least_multi)
    surveys = []
    for values, indices in found:  # in descending order: what is kept comes first
        width = int(((indices >= 0) & (values >= least_multi)).sum(1).max()) if len(values) else 0
        surveys.append(Survey(values[:, : max(1, width)], indices[:, : max(1, width)], least, least_multi))
    return surveys


def kth_largest(values_P: Tensor, k: int, reduce: Reduce = alone) -> Tensor:
    """The k-th largest of all ranks' positive values, a scalar; 0 when there are fewer.

    Exact, by radix: positive floats are ordered as their bits are. The ranks exchange 256 counts per round.
    """
    integer = {4: torch.int32, 8: torch.int64}[values_P.element_size()]
    bits_P = values_P[values_P > 0].view(integer).long()
    total = torch.tensor(len(bits_P), device=values_P.device)
    reduce(total)
    if int(total) < k:
        return values_P.new_zeros(())
    size, prefix, left = 1 << BITS_PER_ROUND, 0, k
    for shift in range(8 * values_P.element_size() - BITS_PER_ROUND, -1, -BITS_PER_ROUND):
        digits_P = (bits_P >> shift) & (size - 1)
        counts = torch.bincount(digits_P, minlength=size)
        reduce(counts)
        above = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = int((above >= left).nonzero()[-1])
        left -= int(above[digit] - counts[digit])
        prefix = prefix << BITS_PER_ROUND | digit
        bits_P = bits_P[digits_P == digit]
    return torch.tensor(prefix, dtype=integer, device=values_P.device).view(values_P.dtype)
