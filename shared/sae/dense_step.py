"""The losses of ReLU, JumpReLU and Gated, whose L0 is free: dense [N, F] products with autograd.

At the start of training half of all latents may fire, so that a sparse form would save nothing. `optim.micro_batch`
bounds the memory. Shapes: N tokens, D d_model, F latents held here, R dead latents.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.kernels import product
from shared.sae.activations import Gated, JumpReLU
from shared.sae.latents import SAELosses, Survey
from shared.sae.losses import penalty_per_latent, preact_loss, weighted_square_error
from shared.sae.straight_through import step

if TYPE_CHECKING:
    from shared.sae.model import SAE


def dense_losses(sae: "SAE", x: Tensor, dead: Tensor | None, penalty_scale: float, survey: Survey | None) -> SAELosses:
    """See ``SAE.losses``; `penalty_scale` multiplies the sparsity penalties, for their warm-up."""
    config = sae.config
    with torch.no_grad():
        centred_ND, target_ND, _, _ = sae.encoder_input(x)
    input_ND = centred_ND
    shared = sae.shared_pre_bias()
    if shared is not None:  # the gradient of b_dec goes through the encoder too
        input_ND = centred_ND - (shared - shared.detach())
    z_NF = product(input_ND, sae.W_enc.T, sae.b_enc, compute=sae.compute)
    f_NF = sae.activation.dense(z_NF, sae.b_enc)
    decoded_ND = product(f_NF, sae.W_dec, compute=sae.compute)
    error_ND = sae.part.sum_forward(decoded_ND) + sae.b_dec - target_ND
    reconstruction = weighted_square_error(error_ND, sae.loss_weight())
    total = reconstruction
    metrics: dict[str, Tensor] = {}

    norm_F = sae.decoder_norm()
    if config.penalty != "none":
        penalty = sae.part.sum_forward(_penalty(sae, z_NF, f_NF, norm_F, survey))
        total = total + config.penalty_weight * penalty_scale * penalty
        metrics["penalty"] = penalty.detach()
    if isinstance(sae.activation, Gated):
        # The gate must be a good encoder by itself; frozen, the decoder learns from the magnitudes alone.
        gate_ND = product(torch.relu(z_NF), sae.W_dec.detach(), compute=sae.compute)
        gate_ND = sae.part.sum_forward(gate_ND) + sae.b_dec.detach()
        gate = weighted_square_error(gate_ND - target_ND, sae.loss_weight())
        total = total + gate
        metrics["gate"] = gate.detach()
    preact = _preact(sae, z_NF, norm_F, dead)
    if preact is not None:
        total = total + config.preact_weight * penalty_scale * preact
        metrics["preact"] = preact.detach()
    auxk = sae.auxk(-error_ND.detach(), centred_ND, dead)
    if auxk is not None:
        total = total + config.auxk_alpha * auxk
        metrics["auxk"] = auxk.detach()
    with torch.no_grad():
        metrics["reconstruction"] = reconstruction.detach()
        metrics["fvu"] = sae.fvu(error_ND)
        metrics["l0"] = f_NF.count_nonzero() / len(f_NF)  # f >= 0; a sum of booleans would copy them to float32
        fired = (f_NF > 0).any(0)
    return SAELosses(
        total=total,
        reconstruction=metrics["reconstruction"],
        fired=fired,
        auxk=metrics.get("auxk"),
        metrics=metrics,
    )


def _penalty(sae: "SAE", z_NF: Tensor, f_NF: Tensor, norm_F: Tensor | None, survey: Survey | None) -> Tensor:
    """The sparsity penalty of the latents held here, mean over tokens."""
    if sae.config.penalty == "l0":
        assert isinstance(sae.activation, JumpReLU)
        return step(z_NF, sae.activation.log_threshold, sae.activation.bandwidth).sum(1).mean()
    # Gated: the gate alone decides about sparsity, so magnitudes do not shrink.
    strength_NF = torch.relu(z_NF) if isinstance(sae.activation, Gated) else f_NF
    frequency_F = None if survey is None else survey.frequency
    return penalty_per_latent(strength_NF, sae.config, norm_F, frequency_F).sum()


def _preact(sae: "SAE", z_NF: Tensor, norm_F: Tensor | None, dead: Tensor | None) -> Tensor | None:
    """The pre-activation penalty over all parts; None where it is off."""
    if sae.config.preact_weight == 0 or dead is None:
        return None
    assert isinstance(sae.activation, JumpReLU)
    dead_R = dead.nonzero().squeeze(1) if dead.dtype == torch.bool else dead
    below = preact_loss(
        z_NF.index_select(1, dead_R),
        sae.activation.log_threshold.index_select(0, dead_R),
        None if norm_F is None else norm_F.index_select(0, dead_R),
    )
    return sae.part.sum_forward(below)
