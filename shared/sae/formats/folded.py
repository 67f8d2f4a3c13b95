"""Dictionaries of several places on raw activations: their normalisation folded into their weights.

    z_g = W_enc,g x + b_enc,g;   f = activation(z);   y = sum_g f_g W_dec,g + b_dec (+ W_skip x)

Folding keeps z, hence every latent's value and threshold (``shared.sae.formats.sides``). Legend: F latents of a group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.formats.held import calibration_hint, check_gate, named
from shared.sae.formats.sides import Sides
from shared.sae.sites import Sites


@dataclass(frozen=True)
class FoldedGroup:
    """Weights of one group, float32, row per latent."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    threshold: Tensor | None
    """[F]: what z must be above; None: 0."""


@dataclass(frozen=True)
class Folded:
    """A dictionary whose latents fire by a threshold of their own, on raw activations."""

    groups: tuple[FoldedGroup, ...]
    b_dec: Tensor
    W_skip: Tensor | None
    """[d_out, d_in]."""
    write_widths: tuple[int, ...]
    sites: Sites
    model: str | None
    """Id of the language model, where it is recorded."""

    @classmethod
    def of(
        cls,
        config: DictionaryConfig,
        tensors: Mapping[str, Tensor],
        places: Sequence[tuple[slice, slice]],
        provenance: Mapping[str, Any],
        form: str,
    ) -> Self:
        """Fold a config and its ``state_dict``; `places` are the columns that each group reads and writes.

        Raises GranaryError, naming the format `form`, for what has no such function.
        """
        if config.unit == "sequence":
            raise GranaryError(f"the {form} format has no {named(config.kind)}: their latents attend to other tokens")
        if not config.writes_rows:
            raise GranaryError(f"the {form} format has no {named(config.kind)}: their latents are maps, not rows")
        if config.activation == "topk":
            raise GranaryError(
                f"the {form} format has no topk: its latents fire by a threshold. {calibration_hint(config.k)}"
            )
        if config.activation not in ("batchtopk", "relu", "jumprelu"):
            raise GranaryError(f"the {form} format has no {config.activation}: it holds batchtopk, relu and jumprelu")
        if config.normalisation == "layer_norm":
            raise GranaryError(f"the {form} format has no layer_norm: per-token scales can't be folded into weights")
        check_gate(form, config)
        if config.sites is None:
            raise GranaryError("the dictionary does not record where it reads and writes")
        of = {name: tensor.detach().double() for name, tensor in tensors.items()}
        sides = Sides.of(config, of)
        b_dec, W_skip = sides.written(of["b_dec"], of.get("W_skip"))
        groups = []
        for number, (reads, writes) in enumerate(places):
            prefix = "" if "W_enc" in of else f"layers.{number}."
            W_enc, b_enc = of[f"{prefix}W_enc"] * sides.scale_in[reads], of[f"{prefix}b_enc"]
            b_enc = b_enc - W_enc @ sides.mean_in[reads]
            if config.pre_bias:
                b_enc = b_enc - of[f"{prefix}W_enc"] @ of["b_dec"]
            W_dec = of[f"{prefix}W_dec"] / sides.scale_out[writes]
            threshold = None
            if config.activation == "jumprelu":
                threshold = of[f"{prefix}activation.log_threshold"].exp().float()
            elif config.activation == "batchtopk":
                threshold = of[f"{prefix}activation.threshold"].float().expand(len(b_enc))
            groups.append(FoldedGroup(W_enc.float(), b_enc.float(), W_dec.float(), threshold))
        return cls(
            groups=tuple(groups),
            b_dec=b_dec.float(),
            W_skip=None if W_skip is None else W_skip.float(),
            write_widths=config.widths.writes,
            sites=config.sites,
            model=(provenance.get("model") or {}).get("id"),
        )
