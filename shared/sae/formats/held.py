"""What a format holds of each kind of dictionary, and how a refusal says it."""

from collections.abc import Mapping

from shared.basics.errors import GranaryError
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.config import DictionaryConfig

NAMES = {"sae": "SAEs", "clt": "cross-layer transcoders"}
"""Kinds in the plural, where that is not the name with an s."""


def check_held(form: str, holds: Mapping[str, tuple[str, ...]], config: DictionaryConfig) -> None:
    """Raise GranaryError for a kind of dictionary, or an activation of it, that the format `form` does not hold."""
    held = holds.get(config.kind)
    if held is None:
        kinds = ", ".join(named(kind) for kind in holds)
        raise GranaryError(f"the {form} format has no {named(config.kind)}: it holds {kinds}")
    if config.activation not in held:
        told = f"the {form} format has no {config.activation} {named(config.kind)}: it holds {', '.join(held)}"
        kind = ACTIVATION_KINDS[config.activation]
        by_threshold = kind.fixes_l0 and kind.is_learnt and {"batchtopk", "jumprelu"} & set(held)
        raise GranaryError(f"{told}. {calibration_hint(config.k)}" if by_threshold else told)
    check_gate(form, config)


def check_gate(form: str, config: DictionaryConfig) -> None:
    """Raise GranaryError for a threshold on what is weighted by norms, which are those of the normalised sites."""
    if getattr(config, "gate", "joint") == "sum" and config.activation == "batchtopk":
        raise GranaryError(f"the {form} format has no gate=sum: train with variant.gate=joint")


def calibration_hint(k: int | None) -> str:
    """How a dictionary of k latents per token becomes one that fires by a threshold."""
    return (
        f"Train with sae=batchtopk sae.k={k}, or give this one a threshold: `convert --threshold STORE` calibrates it "
        f"on a store's held-out tokens to the same L0 of {k} on average"
    )


def named(kind: str) -> str:
    """The kind in the plural."""
    return NAMES.get(kind, f"{kind.replace('_', ' ')}s")
