"""Which configurations of an SAE make sense: ranges of single fields, and combinations that contradict each other."""

import math
from typing import TYPE_CHECKING

from shared.basics.errors import GranaryError
from shared.sae.activations import ACTIVATIONS

if TYPE_CHECKING:
    from shared.sae.config import SAEConfig

CHOICES = {
    "activation": tuple(ACTIVATIONS),
    "normalisation": ("none", "scale", "centre_scale", "layer_norm"),
    "loss": ("fvu", "fvu_per_dim"),
    "penalty": ("none", "l0", "l1", "tanh", "tanh_quad"),
    "bias_init": ("zero", "mean", "geometric_median"),
    "encoder_init": ("scaled", "transpose", "norm_search"),
}
AT_LEAST_ONE = ("d_model", "d_latent", "k", "auxk_k", "multi_topk_factor", "dead_after_tokens", "init_subspace")
NOT_NEGATIVE = ("auxk_alpha", "multi_topk_weight", "penalty_weight", "preact_weight")
POSITIVE = ("tanh_scale", "frequency_scale", "bandwidth", "threshold_init")


def check(config: "SAEConfig") -> None:
    """Raise GranaryError, one line with the reason, for the first thing that is wrong."""
    for name in AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise GranaryError(f"sae.{name}={value}: must be at least 1")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise GranaryError(f"sae.{name}={getattr(config, name)!r}: choose from {', '.join(choices)}")
    for name in NOT_NEGATIVE:
        if not (math.isfinite(getattr(config, name)) and getattr(config, name) >= 0):
            raise GranaryError(f"sae.{name}={getattr(config, name)}: must be a number that is not negative")
    for name in POSITIVE:
        if not (math.isfinite(getattr(config, name)) and getattr(config, name) > 0):
            raise GranaryError(f"sae.{name}={getattr(config, name)}: must be a positive number")
    if not 0 <= config.threshold_decay < 1:
        raise GranaryError(f"sae.threshold_decay={config.threshold_decay}: must lie in [0, 1)")
    _check_sparsity(config)
    _check_prefixes(config)
    if not config.shift_back and config.normalisation != "layer_norm":
        raise GranaryError("sae.shift_back=false is for normalisation=layer_norm alone")
    if config.encoder_init == "norm_search" and config.unit_norm_decoder:
        raise GranaryError(
            "sae.encoder_init=norm_search looks for the decoder's norm, which sae.unit_norm_decoder=true fixes at 1: "
            "use scaled, or unit_norm_decoder=false"
        )
    if config.init_subspace is not None and config.init_subspace > config.d_model:
        raise GranaryError(f"sae.init_subspace={config.init_subspace} is more than the {config.d_model} dimensions")


def check_trainable(config: "SAEConfig") -> None:
    """Raise GranaryError for what can be loaded but not learnt."""
    if ACTIVATIONS[config.activation].penalties and not (config.penalty != "none" and config.penalty_weight > 0):
        raise GranaryError(
            f"sae.activation={config.activation} is not sparse without a penalty: set sae.penalty to one of "
            f"{', '.join(ACTIVATIONS[config.activation].penalties)} and sae.penalty_weight above 0"
        )


def _check_sparsity(config: "SAEConfig") -> None:
    """k or a penalty, as the activation asks."""
    activation = ACTIVATIONS[config.activation]
    if activation.fixes_l0:
        if config.k is None:
            raise GranaryError(f"sae.activation={config.activation} needs sae.k, the active latents per token")
        if config.k > config.d_latent:
            raise GranaryError(
                f"sae.k={config.k} is more than the {config.d_latent} latents: lower sae.k or raise sae.expansion"
            )
        if config.penalty != "none":
            raise GranaryError(
                f"sae.penalty={config.penalty} with sae.activation={config.activation}: k fixes how many latents fire "
                "and a penalty would only shrink them; set sae.penalty=none"
            )
    else:
        if config.k is not None:
            raise GranaryError(
                f"sae.k={config.k} with sae.activation={config.activation}: its sparsity comes from "
                "sae.penalty_weight; set sae.k=null"
            )
        if config.penalty not in ("none", *activation.penalties):
            raise GranaryError(
                f"sae.penalty={config.penalty} with sae.activation={config.activation}: choose from "
                f"{', '.join(activation.penalties)}" + _why_not(config)
            )
        if config.multi_topk_weight > 0:
            raise GranaryError(
                f"sae.multi_topk_weight={config.multi_topk_weight} with sae.activation={config.activation}: there is "
                "no k to take a multiple of; set it to 0"
            )
    if config.penalty == "none" and config.penalty_weight > 0:
        raise GranaryError(f"sae.penalty_weight={config.penalty_weight} with sae.penalty=none: choose a penalty")
    if config.preact_weight > 0 and config.activation != "jumprelu":
        raise GranaryError(
            f"sae.preact_weight={config.preact_weight} with sae.activation={config.activation}: only jumprelu has "
            "thresholds to pull dead latents towards; set it to 0"
        )


def _why_not(config: "SAEConfig") -> str:
    """The reason, where there is more to say than which penalties there are."""
    if config.penalty == "l0":
        return "; l0 needs jumprelu's straight-through thresholds"
    if config.penalty == "l1" and config.activation == "jumprelu":
        return "; jumprelu exists to avoid the shrinkage that l1 causes"
    return ""


def _check_prefixes(config: "SAEConfig") -> None:
    prefixes = config.prefixes
    if prefixes is None:
        return
    if not ACTIVATIONS[config.activation].fixes_l0:
        raise GranaryError(
            f"sae.prefixes with sae.activation={config.activation}: Matryoshka groups are for topk and batchtopk"
        )
    if config.multi_topk_weight > 0:
        raise GranaryError("sae.prefixes and sae.multi_topk_weight both add reconstruction losses: use one of them")
    ascending = list(prefixes) == sorted(set(prefixes)) and prefixes and prefixes[0] >= 1
    if not ascending or prefixes[-1] != config.d_latent:
        raise GranaryError(
            f"sae.prefixes={list(prefixes)}: ascending numbers of latents, the last of them d_latent={config.d_latent}"
        )
