"""The losses of ReLU, JumpReLU and Gated, whose L0 is free: dense [N, F] products with autograd.

At the start of training half of all latents may fire, so that a sparse form would save nothing. `optim.micro_batch`
bounds the memory. Shapes: N tokens, D width, F latents held here, R dead latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.sae.contexts import Given
from shared.sae.learn.inputs import Losses, StepInputs, dead_indices
from shared.sae.learn.losses import penalty_per_latent, preact_loss, weighted_square_error
from shared.sae.learn.maps import load_of_maps
from shared.sae.learn.terms import LossTerms


@dataclass(frozen=True, slots=True)
class DenseForm:
    """An activation that trains densely, as functions of its pre-activations z [N, F]."""

    activation: Callable[[Tensor], Tensor]
    """All latents [N, F], differentiable."""
    l0: Callable[[Tensor], Tensor] | None = None
    """Mean number of latents per token, a scalar with a gradient; None where it has none."""
    log_threshold_F: Tensor | None = None
    """What dead latents' pre-activations can be pulled up to; None without thresholds."""
    gate: Callable[[Tensor], Tensor] | None = None
    """What reconstructs by itself, and alone decides about sparsity, beside the latents; None: nothing does."""


def dense_losses(terms: LossTerms, x: Given, y: Tensor, inputs: StepInputs, form: DenseForm) -> Losses:
    """See ``Objective.losses``."""
    own, learning = terms.sole, terms.learning
    group, b_dec = own.group, terms.dictionary.b_dec
    with torch.no_grad():
        centred, target_ND, _, _ = terms.prepare(x, y)
    wanted_ND = terms.wanted(target_ND, centred)
    given = centred
    shared = terms.shared_pre_bias()
    if shared is not None:  # the gradient of b_dec goes through the encoder too
        assert isinstance(centred, Tensor)
        given = centred - (shared - shared.detach())
    z_NF = group.preactivations(given)
    f_NF = form.activation(z_NF)
    decoded_ND = group.write_all(f_NF, given)
    error_ND = terms.shard.sum_forward(decoded_ND) + b_dec - wanted_ND
    reconstruction = weighted_square_error(error_ND, terms.loss_weight())
    total = reconstruction
    metrics: dict[str, Tensor] = {}

    norm_F = group.decoder_norm()
    if learning.penalty != "none":
        penalty = terms.shard.sum_forward(_penalty(terms, form, z_NF, f_NF, norm_F, inputs))
        total = total + learning.penalty_weight * inputs.penalty_scale * penalty
        metrics["penalty"] = penalty.detach()
    if form.gate is not None:
        # The gate must be a good encoder by itself; frozen, the decoder learns from the magnitudes alone.
        gate_ND = group.write_all(form.gate(z_NF), given, frozen=True)
        gate_ND = terms.shard.sum_forward(gate_ND) + b_dec.detach()
        gate = weighted_square_error(gate_ND - wanted_ND.detach(), terms.loss_weight())
        total = total + gate
        metrics["gate"] = gate.detach()
    preact = _preact(terms, form, z_NF, norm_F, inputs.dead)
    if preact is not None:
        total = total + learning.preact_weight * inputs.penalty_scale * preact
        metrics["preact"] = preact.detach()
    auxk = own.auxk(-error_ND.detach(), centred, inputs.dead)
    if auxk is not None:
        total = total + learning.auxk_alpha * auxk
        metrics["auxk"] = auxk.detach()
    with torch.no_grad():
        metrics["reconstruction"] = reconstruction.detach()
        metrics["fvu"] = terms.fvu(error_ND)
        metrics |= terms.fvu_by_site(error_ND)
        metrics["l0"] = f_NF.count_nonzero() / len(f_NF)  # f >= 0; a sum of booleans would copy them to float32
        fired = (f_NF > 0).any(0)
        if not group.writes_rows:
            metrics |= load_of_maps(terms, f_NF.count_nonzero(0), len(f_NF))
    return Losses(total=total, reconstruction=metrics["reconstruction"], fired=fired, metrics=metrics)


def _penalty(
    terms: LossTerms, form: DenseForm, z_NF: Tensor, f_NF: Tensor, norm_F: Tensor | None, inputs: StepInputs
) -> Tensor:
    """The sparsity penalty of the latents held here, mean over tokens."""
    if terms.learning.penalty == "l0":
        assert form.l0 is not None
        return form.l0(z_NF)
    # Gated: the gate alone decides about sparsity, so magnitudes do not shrink.
    strength_NF = f_NF if form.gate is None else form.gate(z_NF)
    frequency_F = None if inputs.facts is None else inputs.facts.frequency
    return penalty_per_latent(strength_NF, terms.learning, norm_F, frequency_F).sum()


def _preact(
    terms: LossTerms, form: DenseForm, z_NF: Tensor, norm_F: Tensor | None, dead: Tensor | None
) -> Tensor | None:
    """The pre-activation penalty over all parts; None where it is off."""
    if terms.learning.preact_weight == 0 or dead is None:
        return None
    assert form.log_threshold_F is not None
    dead_R = dead_indices(dead)
    below = preact_loss(
        z_NF.index_select(1, dead_R),
        form.log_threshold_F.index_select(0, dead_R),
        None if norm_F is None else norm_F.index_select(0, dead_R),
    )
    return terms.shard.sum_forward(below)
