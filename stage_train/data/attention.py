"""Whose attention a Lorsa has: the keys ``variant.attention`` and ``variant.model``, and what they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.basics.config import ModelInput
from shared.basics.errors import GranaryError
from shared.sae.sites import Sites
from shared.store import Store
from stage_train.config import TrainSchema

FORMS = ("model", "plain")


@dataclass(frozen=True, slots=True)
class AttentionSource:
    """A layer of a language model."""

    path: str
    revision: str | None
    layer: int


def completed(cfg: TrainSchema, sites: Sites, store: Store) -> tuple[dict[str, Any], AttentionSource | None]:
    """The group ``variant`` as a dictionary's config takes it, and the layer whose attention it has; None: of no model.

    Reads the model's configuration, no weights. Raises GranaryError for keys that make no sense together.
    """
    variant = dict(cfg.variant)
    if variant.get("kind") != "lorsa":
        return variant, None
    whose, path = variant.pop("attention", "model"), variant.pop("model", None)
    if whose not in FORMS:
        raise GranaryError(f"variant.attention={whose}: choose from {', '.join(FORMS)}")
    if whose == "plain":
        return plain(variant), None
    if variant.get("qk_width") is not None:
        raise GranaryError(f"variant.qk_width={variant['qk_width']} is for variant.attention=plain: leave it null")
    source = source_of(path, sites, store)
    from shared.lm.attention import attention_shape  # transformers: needed by no other variant

    shape = attention_shape(source.path, source.revision, source.layer)
    heads = variant.get("qk_heads") or shape.heads
    if variant.get("qk_init") == "model" and heads % shape.heads:
        raise GranaryError(
            f"variant.qk_heads={heads}: with variant.qk_init=model a multiple of the layer's {shape.heads} heads"
        )
    form = shape.form
    return {
        **variant,
        "qk_heads": heads,
        "qk_width": shape.width,
        "scale": form.scale,
        "softcap": form.softcap,
        "window": form.window,
        "frequencies": form.frequencies,
        "rope_scale": form.rope_scale,
        "norm_eps": form.norm_eps,
    }, source


def plain(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of attention without rotation, softcap, norms and window; the scale is that of most models."""
    width = variant.get("qk_width")
    if variant.get("qk_heads") is None or not isinstance(width, int) or width < 1:
        raise GranaryError("variant.attention=plain needs variant.qk_heads and variant.qk_width, whole numbers above 0")
    if variant.get("qk_init") == "model":
        raise GranaryError("variant.attention=plain has no model to begin from: give variant.qk_init=random")
    return {**variant, "scale": width**-0.5}


def source_of(path: str | None, sites: Sites, store: Store) -> AttentionSource:
    """The layer whose attention is read and written. Raises GranaryError for other places, and a model not there."""
    layer, _, place = sites.reads[0].removeprefix("layers.").partition(".")
    if len(sites.reads) != 1 or place != "attn_in" or not layer.isdecimal():
        raise GranaryError(
            f"variant.attention=model is for reads=layers.N.attn_in writes=layers.N.attn_out, not {sites}: give "
            "variant.attention=plain"
        )
    from shared.lm.recorded import choose_model

    choice = choose_model(ModelInput(path=path, revision=None, dtype=None, allow_other=False), store)
    return AttentionSource(choice.path, choice.revision, int(layer))
