"""What an SAE is: every choice that its weights, its outputs or its losses depend on."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

from shared.basics.errors import GranaryError
from shared.sae.rules import check


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape, activation, normalisation and losses of one SAE. Stored in the checkpoint; values come from ``conf/sae``.

    Raises GranaryError when a field is out of its range or two fields contradict each other.
    """

    d_model: int
    """Width of the activations."""
    d_latent: int
    """Number of latents, F."""
    k: int | None = None
    """Active latents per token, for topk and batchtopk; null for the others."""
    activation: str = "topk"
    """One of ``shared.sae.activations.ACTIVATIONS``: topk, batchtopk, relu, jumprelu, gated."""
    prefixes: tuple[int, ...] | None = None
    """Matryoshka (Bussmann et al. 2025), for topk and batchtopk: the reconstruction loss is the sum of those with the
    first prefixes[i] latents alone; ascending, the last is d_latent. null: the whole dictionary alone."""
    normalisation: str = "centre_scale"
    """none; scale: times sqrt(d) / mean norm; centre_scale: minus the mean, then to RMS norm sqrt(d); layer_norm: per
    token to mean 0, standard deviation 1."""
    shift_back: bool = True
    """Undo layer_norm on the reconstruction. False: read normalised activations but reconstruct raw ones, as the SAEs
    that OpenSAE released."""
    pre_bias: bool = True
    """Subtract b_dec before the encoder."""
    unit_norm_decoder: bool = True
    """Decoder rows have unit norm after every step. False: their norm is free, and weighs the sparsity penalty, which
    could be escaped by growing it otherwise."""
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
    penalty: str = "none"
    """Sparsity penalty of relu (l1, tanh, tanh_quad), jumprelu (l0, tanh, tanh_quad) and gated (l1); none for the
    others."""
    penalty_weight: float = 0.0
    """Its weight; the reconstruction loss counts 1."""
    tanh_scale: float = 4.0
    """c in tanh(c f) (Anthropic, January 2025)."""
    frequency_scale: float = 0.01
    """s in tanh_quad: p (1 + p / s), with p the batch's mean of tanh(c f) (Language-Model-SAEs)."""
    bandwidth: float = 2.0
    """Width of jumprelu's straight-through window around its thresholds (Anthropic, January 2025)."""
    threshold_init: float = 0.1
    """jumprelu's thresholds at the start."""
    preact_weight: float = 0.0
    """Weight of jumprelu's penalty on how far dead latents are below their thresholds; 0 turns it off."""
    threshold_decay: float = 0.99
    """How much of batchtopk's inference threshold is kept per step."""
    dead_after_tokens: int = 10_000_000
    """A latent that has not been nonzero on this many tokens is dead."""
    bias_init: str = "mean"
    """What b_dec starts at: zero, mean or geometric_median of a sample."""
    encoder_init: str = "scaled"
    """transpose: the decoder's transpose as it is; scaled: times the factor that minimises the loss on a sample
    (topk and batchtopk: 1.25 times that); norm_search: rows of decoder and encoder alike get the norm that does
    (Language-Model-SAEs)."""
    init_subspace: int | None = None
    """Decoder rows start within the span of this many principal directions of the sample; null: anywhere."""

    def __post_init__(self) -> None:
        if isinstance(self.prefixes, list):  # as JSON and YAML give it
            object.__setattr__(self, "prefixes", tuple(self.prefixes))
        check(self)

    @property
    def num_aux(self) -> int:
        """Dead latents per token in the AuxK loss, before the dead count limits it."""
        return self.auxk_k if self.auxk_k is not None else max(1, self.d_model // 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, keyed by field name."""
        fields = dataclasses.asdict(self)
        if self.prefixes is not None:
            fields["prefixes"] = list(self.prefixes)
        return fields

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
