"""The losses of TopK, BatchTopK and their Matryoshka forms: a backward pass that costs N x K instead of N x F.

Shapes: N tokens, D_in and D_out widths of what is read and written, F latents held here, K picks per token, G groups of
a Matryoshka.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels import PairOrder, sparse_reconstruction
from shared.sae.contexts import Given
from shared.sae.latent_shard import WHOLE
from shared.sae.latents import SparseLatents
from shared.sae.learn.inputs import Losses, StepInputs
from shared.sae.learn.losses import weighted_square_error
from shared.sae.learn.maps import load_of_maps
from shared.sae.learn.terms import LossTerms


@dataclass(slots=True)
class Selection:
    """Selected pre-activations: the main ones, and those that Multi-TopK adds."""

    values_NK: Tensor
    indices_NK: Tensor
    main: Tensor
    """indices_NK where the pick is a main one, else -1; or its first columns, for TopK."""
    extra: Tensor | None
    """Likewise for the others; None without Multi-TopK."""


Select = Callable[[Given, StepInputs], Selection]
"""From the encoder's input, [N, D_in] or whole contexts, to what fires."""


def sparse_losses(terms: LossTerms, x: Given, y: Tensor, inputs: StepInputs, select: Select) -> Losses:
    """See ``Objective.losses``."""
    own, learning = terms.sole, terms.learning
    group, b_dec = own.group, terms.dictionary.b_dec
    with torch.no_grad():
        centred, target_ND, token_mean, token_scale = terms.prepare(x, y)
        picks = select(centred, inputs)
    wanted_ND = terms.wanted(target_ND, centred)
    num_latents = group.num_latents
    order = PairOrder(picks.indices_NK, num_latents)
    values_NK = group.attach(
        centred, terms.shared_pre_bias(), picks.values_NK, picks.indices_NK, order, own.sink("W_enc")
    )
    metrics: dict[str, Tensor] = {}

    width = picks.main.shape[1]
    main_values = values_NK[:, :width]
    # Without extra picks the encoder and the decoder share one sort of the pairs.
    main_order = order if picks.main is picks.indices_NK else PairOrder(picks.main, num_latents)
    alone = learning.prefixes is None and picks.extra is None and terms.shard is WHOLE and wanted_ND is target_ND
    alone = alone and group.writes_rows
    if alone:  # one reconstruction, of latents that are all here
        reconstruction, fvu, residual_ND = sparse_reconstruction(
            main_values, picks.main, group.W_dec, b_dec, target_ND, terms.loss_weight(), terms.fvu_weight(),
            main_order, compute=group.compute, sink=own.sink("W_dec"),
        )  # fmt: skip
    elif learning.prefixes is None:
        decoded_ND = _decode(terms, main_values, picks.main, main_order, centred)
        error_ND = decoded_ND + b_dec - wanted_ND
        reconstruction = weighted_square_error(error_ND, terms.loss_weight())
    else:
        error_GND = _decode_prefixes(terms, main_values, picks.main, learning.prefixes) + b_dec - wanted_ND
        reconstruction = torch.stack([weighted_square_error(error, terms.loss_weight()) for error in error_GND]).sum()
        error_ND = error_GND[-1]
    if not alone:
        residual_ND, fvu = -error_ND.detach(), terms.fvu(error_ND)
    total = reconstruction
    if picks.extra is not None:
        extra_values = values_NK[:, -picks.extra.shape[1] :]
        extra_ND = _decode(terms, extra_values, picks.extra, PairOrder(picks.extra, num_latents), centred)
        multi = weighted_square_error(error_ND + extra_ND, terms.loss_weight())
        total = total + learning.multi_topk_weight * multi
        metrics["multi_topk"] = multi.detach()

    auxk = own.auxk(residual_ND, centred, inputs.dead)
    if auxk is not None:
        total = total + learning.auxk_alpha * auxk
        metrics["auxk"] = auxk.detach()
    with torch.no_grad():
        metrics["reconstruction"] = reconstruction.detach()
        metrics["fvu"] = fvu
        metrics |= terms.fvu_by_site(residual_ND)
        metrics["l0"] = (picks.main >= 0).sum(dtype=torch.float32) / picks.main.shape[0]
        fired = torch.zeros(num_latents + 1, dtype=torch.bool, device=y.device)
        fired.index_fill_(0, picks.main.reshape(-1) % (num_latents + 1), True)  # padding, -1, to the last slot
        if not group.writes_rows:
            metrics |= load_of_maps(terms, _counts(picks.main, num_latents), len(x))
    return Losses(
        total=total,
        reconstruction=metrics["reconstruction"],
        fired=fired[:-1],
        latents=SparseLatents(main_values.detach(), picks.main, token_mean, token_scale),
        metrics=metrics,
    )


def _decode(
    terms: LossTerms, values_NK: Tensor, indices_NK: Tensor, order: PairOrder, read: Given | None = None
) -> Tensor:
    """Decoded latents without b_dec, over all parts."""
    own = terms.sole
    decoded_ND = own.group.write(values_NK, indices_NK, order, own.sink("W_dec"), read=read)
    return terms.shard.sum_forward(decoded_ND)


def _counts(indices_NK: Tensor, num_latents: int) -> Tensor:
    """How often each latent is among the picks, [F]."""
    return torch.bincount(indices_NK.reshape(-1) % (num_latents + 1), minlength=num_latents + 1)[:-1]


def _decode_prefixes(terms: LossTerms, values_NK: Tensor, indices_NK: Tensor, prefixes: tuple[int, ...]) -> Tensor:
    """The decoding [G, N, D_out] of the latents below each prefix.

    One decode: the picks of each group are rows of their own, and their running sums the prefixes' reconstructions.
    """
    num_groups, (num_rows, _) = len(prefixes), indices_NK.shape
    latents_NK = indices_NK + terms.shard.first
    group_NK = torch.stack([latents_NK >= bound for bound in prefixes]).sum(0)  # no tensor of theirs from the host
    groups = torch.arange(num_groups, device=indices_NK.device)[:, None, None]
    indices_GNK = indices_NK.masked_fill(group_NK != groups, -1).flatten(0, 1)
    values_GNK = values_NK.expand(num_groups, -1, -1).flatten(0, 1)
    decoded = _decode(terms, values_GNK, indices_GNK, PairOrder(indices_GNK, terms.sole.group.num_latents))
    return decoded.view(num_groups, num_rows, -1).cumsum(0)
