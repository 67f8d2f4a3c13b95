"""What an SAE is: every choice that its weights, its outputs or its losses depend on."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Self

from shared.errors import GranaryError
from shared.sae.activations import ACTIVATIONS

NORMALISATIONS = ("none", "scale", "centre_scale", "layer_norm")
LOSSES = ("fvu", "fvu_per_dim")
BIAS_INITS = ("zero", "mean", "geometric_median")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape, activation, normalisation and losses of one SAE. Stored in the checkpoint; values come from ``conf/sae``.

    Raises GranaryError when a field is out of its range or two fields contradict each other.
    """

    d_model: int
    """Width of the activations."""
    d_latent: int
    """Number of latents, F."""
    k: int
    """Active latents per token."""
    activation: str = "topk"
    """One of ``shared.sae.activations.ACTIVATIONS``."""
    normalisation: str = "centre_scale"
    """none; scale: times sqrt(d) / mean norm; centre_scale: minus the mean, then to RMS norm sqrt(d); layer_norm: per
    token to mean 0, standard deviation 1."""
    shift_back: bool = True
    """Undo layer_norm on the reconstruction. False: read normalised activations but reconstruct raw ones, as the SAEs
    that OpenSAE released; for loading those, not for training."""
    pre_bias: bool = True
    """Subtract b_dec before the encoder."""
    loss: str = "fvu"
    """Reconstruction loss. fvu: squared error over total variance; fvu_per_dim: mean over dimensions of each one's
    squared error over its variance, as OpenSAE."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss on dead latents (Gao et al. 2024); 0 turns it off."""
    auxk_k: int | None = None
    """Dead latents that regress the residual, per token; null: d_model / 2."""
    multi_topk_weight: float = 0.0
    """Weight of the reconstruction loss with multi_topk_factor * k latents (Gao et al. 2024: 1/8); 0 turns it off."""
    multi_topk_factor: int = 4
    """How many times k the Multi-TopK loss uses."""
    dead_after_tokens: int = 10_000_000
    """A latent that has not been nonzero on this many tokens is dead."""
    bias_init: str = "mean"
    """What b_dec starts at: zero, mean or geometric_median of a sample."""

    def __post_init__(self) -> None:
        for name in ("d_model", "d_latent", "k", "multi_topk_factor", "dead_after_tokens"):
            if getattr(self, name) < 1:
                raise GranaryError(f"sae.{name}={getattr(self, name)}: must be at least 1")
        if self.k > self.d_latent:
            raise GranaryError(
                f"sae.k={self.k} is more than the {self.d_latent} latents: lower sae.k or raise sae.expansion"
            )
        for name, choices in (
            ("activation", tuple(ACTIVATIONS)),
            ("normalisation", NORMALISATIONS),
            ("loss", LOSSES),
            ("bias_init", BIAS_INITS),
        ):
            if getattr(self, name) not in choices:
                raise GranaryError(f"sae.{name}={getattr(self, name)!r}: choose from {', '.join(choices)}")
        if not self.shift_back and self.normalisation != "layer_norm":
            raise GranaryError("sae.shift_back=false is for normalisation=layer_norm alone")
        for name in ("auxk_alpha", "multi_topk_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise GranaryError(f"sae.{name}={getattr(self, name)}: must be a number that is not negative")
        if self.auxk_k is not None and self.auxk_k < 1:
            raise GranaryError(f"sae.auxk_k={self.auxk_k}: must be at least 1, or null for d_model / 2")

    @property
    def num_aux(self) -> int:
        """Dead latents per token in the AuxK loss, before the dead count limits it."""
        return self.auxk_k if self.auxk_k is not None else max(1, self.d_model // 2)

    @property
    def num_multi(self) -> int:
        """Latents per token in the Multi-TopK loss; k when it is off."""
        return min(self.multi_topk_factor * self.k, self.d_latent) if self.multi_topk_weight > 0 else self.k

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, keyed by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; raises GranaryError for a key this version does not know or a missing one."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise GranaryError(f"the SAE config has unknown keys {', '.join(unknown)}: is it from a newer version?")
        try:
            return cls(**fields)
        except TypeError as error:
            raise GranaryError(f"the SAE config is incomplete: {error}") from None

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of ``to_json``."""
        return cls.from_dict(json.loads(text))
