"""The losses of TopK, BatchTopK and their Matryoshka forms: a backward pass that costs N x K instead of N x F.

Shapes: N tokens, D d_model, F latents held here, K picks per token, G Matryoshka groups.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.kernels import PairOrder, attach_encoder, sparse_decode
from shared.sae.activations import TopK
from shared.sae.latents import SAELosses, SparseLatents, Survey
from shared.sae.losses import weighted_square_error

if TYPE_CHECKING:
    from shared.sae.model import SAE


@dataclass(slots=True)
class Picks:
    """Picked pre-activations: the main ones, and those that Multi-TopK adds."""

    values_NK: Tensor
    indices_NK: Tensor
    main: Tensor
    """indices_NK where the pick is a main one, else -1; or its first columns, for TopK."""
    extra: Tensor | None
    """Likewise for the others; None without Multi-TopK."""


def sparse_losses(sae: "SAE", x: Tensor, dead: Tensor | None, k: int, survey: Survey | None) -> SAELosses:
    """See ``SAE.losses``. `survey` is that of the batch, for BatchTopK."""
    config = sae.config
    with torch.no_grad():
        centred_ND, target_ND, token_mean, token_scale = sae.encoder_input(x)
        picks = _pick_topk(sae, centred_ND, k) if survey is None else _pick_batchtopk(survey)
    num_latents = sae.W_enc.shape[0]
    order = PairOrder(picks.indices_NK, num_latents)
    values_NK = attach_encoder(
        centred_ND, sae.shared_pre_bias(), sae.W_enc, sae.b_enc, picks.values_NK, picks.indices_NK, order,
        compute=sae.compute, sink=sae.sink("W_enc"),
    )  # fmt: skip
    metrics: dict[str, Tensor] = {}

    width = picks.main.shape[1]
    main_values = values_NK[:, :width]
    # Without extra picks the encoder and the decoder share one sort of the pairs.
    main_order = order if picks.main is picks.indices_NK else PairOrder(picks.main, num_latents)
    if config.prefixes is None:
        decoded_ND = _decode(sae, main_values, picks.main, main_order)
        error_ND = decoded_ND + sae.b_dec - target_ND
        reconstruction = weighted_square_error(error_ND, sae.loss_weight())
    else:
        error_GND = _decode_prefixes(sae, main_values, picks.main, config.prefixes) + sae.b_dec - target_ND
        reconstruction = torch.stack([weighted_square_error(error, sae.loss_weight()) for error in error_GND]).sum()
        error_ND = error_GND[-1]
    total = reconstruction
    if picks.extra is not None:
        extra_values = values_NK[:, -picks.extra.shape[1] :]
        extra_ND = _decode(sae, extra_values, picks.extra, PairOrder(picks.extra, num_latents))
        multi = weighted_square_error(error_ND + extra_ND, sae.loss_weight())
        total = total + config.multi_topk_weight * multi
        metrics["multi_topk"] = multi.detach()

    auxk = sae.auxk(-error_ND.detach(), centred_ND, dead)
    if auxk is not None:
        total = total + config.auxk_alpha * auxk
        metrics["auxk"] = auxk.detach()
    with torch.no_grad():
        metrics["reconstruction"] = reconstruction.detach()
        metrics["fvu"] = sae.fvu(error_ND)
        metrics["l0"] = (picks.main >= 0).sum(dtype=torch.float32) / picks.main.shape[0]
        fired = torch.zeros(num_latents + 1, dtype=torch.bool, device=x.device)
        fired[picks.main.reshape(-1)] = True  # -1 is the last slot
    return SAELosses(
        total=total,
        reconstruction=metrics["reconstruction"],
        fired=fired[:-1],
        latents=SparseLatents(main_values.detach(), picks.main, token_mean, token_scale),
        auxk=metrics.get("auxk"),
        multi_topk=metrics.get("multi_topk"),
        metrics=metrics,
    )


def _pick_topk(sae: "SAE", centred_ND: Tensor, k: int) -> Picks:
    """In descending order: the first k columns are the main ones."""
    assert isinstance(sae.activation, TopK)
    config = sae.config
    width = min(config.multi_topk_factor * k, config.d_latent) if config.multi_topk_weight > 0 else k
    values_NK, indices_NK = sae.activation.select(sae, centred_ND, width)
    if width == k:
        return Picks(values_NK, indices_NK, indices_NK, None)
    return Picks(values_NK, indices_NK, indices_NK[:, :k], indices_NK[:, k:])


def _pick_batchtopk(survey: Survey) -> Picks:
    """Every value from the batch's least on: at a tie all are kept, so that no row or rank has precedence."""
    values_NM, indices_NM = survey.values, survey.indices
    assert values_NM is not None
    assert indices_NM is not None
    assert survey.least is not None
    assert survey.least_multi is not None
    main = indices_NM.masked_fill(values_NM < survey.least, -1)
    extra = None
    if survey.least_multi is not survey.least:
        extra = indices_NM.masked_fill((values_NM < survey.least_multi) | (main >= 0), -1)
        indices_NM = torch.maximum(main, extra)
    else:
        indices_NM = main
    return Picks(values_NM.masked_fill(indices_NM < 0, 0), indices_NM, main, extra)


def _decode(sae: "SAE", values_NK: Tensor, indices_NK: Tensor, order: PairOrder) -> Tensor:
    """Decoded latents without b_dec, over all parts."""
    decoded_ND = sparse_decode(
        values_NK, indices_NK, sae.W_dec, order,
        compute=sae.compute, sink=sae.sink("W_dec"),
    )  # fmt: skip
    return sae.part.sum_forward(decoded_ND)


def _decode_prefixes(sae: "SAE", values_NK: Tensor, indices_NK: Tensor, prefixes: tuple[int, ...]) -> Tensor:
    """The decoding [G, N, D] of the latents below each prefix.

    One decode: the picks of each group are rows of their own, and their running sums the prefixes' reconstructions.
    """
    num_groups, (num_rows, _) = len(prefixes), indices_NK.shape
    bounds = torch.tensor(prefixes, device=indices_NK.device)
    group_NK = torch.bucketize(indices_NK + sae.part.first, bounds, right=True)
    groups = torch.arange(num_groups, device=indices_NK.device)[:, None, None]
    indices_GNK = indices_NK.masked_fill(group_NK != groups, -1).flatten(0, 1)
    values_GNK = values_NK.expand(num_groups, -1, -1).flatten(0, 1)
    decoded = _decode(sae, values_GNK, indices_GNK, PairOrder(indices_GNK, sae.W_enc.shape[0]))
    return decoded.view(num_groups, num_rows, -1).cumsum(0)
