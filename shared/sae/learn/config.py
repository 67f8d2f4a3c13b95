"""How a dictionary is learnt: losses, penalties, dead latents, starting values. A record in what is saved, no more."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from shared.basics.errors import GranaryError
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.config import DictionaryConfig

CHOICES = {
    "loss": ("fvu", "fvu_per_dim"),
    "penalty": ("none", "l0", "l1", "tanh", "tanh_quad"),
    "bias_init": ("zero", "mean", "geometric_median"),
    "encoder_init": ("scaled", "transpose", "norm_search"),
}
AT_LEAST_ONE = ("auxk_k", "multi_topk_factor", "dead_after_tokens", "init_subspace")
NOT_NEGATIVE = ("auxk_alpha", "auxk_slope", "multi_topk_weight", "penalty_weight", "preact_weight")
POSITIVE = ("tanh_scale", "frequency_scale", "bandwidth", "threshold_init")


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """Losses and starting values of one dictionary; values come from ``conf/sae``.

    Raises GranaryError when a field is out of its range; ``check`` finds what contradicts the dictionary.
    """

    prefixes: tuple[int, ...] | None = None
    """Matryoshka (Bussmann et al. 2025), for topk and batchtopk: the reconstruction loss is the sum of those with the
    first prefixes[i] latents alone; ascending, the last is d_latent. null: the whole dictionary alone."""
    loss: str = "fvu"
    """Reconstruction loss. fvu: squared error over total variance; fvu_per_dim: mean over dimensions of each one's
    squared error over its variance, as OpenSAE."""
    auxk_alpha: float = 1 / 32
    """Weight of the AuxK loss on dead latents (Gao et al. 2024); 0 turns it off."""
    auxk_k: int | None = None
    """Dead latents that regress the residual, per token; null: half the width of what is written."""
    auxk_slope: float = 0.0
    """Slope below 0 of the ReLU that dead latents go through in AuxK; 0: a latent below 0 on every token stays dead."""
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
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GranaryError(f"sae.{name}={value}: must be at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise GranaryError(f"sae.{name}={getattr(self, name)!r}: choose from {', '.join(choices)}")
        for name in NOT_NEGATIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise GranaryError(f"sae.{name}={getattr(self, name)}: must be a number that is not negative")
        for name in POSITIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise GranaryError(f"sae.{name}={getattr(self, name)}: must be a positive number")
        if not 0 <= self.threshold_decay < 1:
            raise GranaryError(f"sae.threshold_decay={self.threshold_decay}: must lie in [0, 1)")

    def num_aux(self, d_out: int) -> int:
        """Dead latents per token in the AuxK loss, before the dead count limits it."""
        return self.auxk_k if self.auxk_k is not None else max(1, d_out // 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, keyed by field name."""
        fields = dataclasses.asdict(self)
        if self.prefixes is not None:
            fields["prefixes"] = list(self.prefixes)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read a record of ``to_dict``, of which another version may know other keys: those are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in known})


@dataclass(frozen=True, kw_only=True)
class SkipLearningConfig(LearningConfig):
    """What learning with a skip is told beside."""

    skip_init: str = "zero"
    """Where the linear map starts: zero, or ridge, the regression of what is written on what is read over a sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_init not in ("zero", "ridge"):
            raise GranaryError(f"variant.skip_init={self.skip_init!r}: choose from zero, ridge")


@dataclass(frozen=True, kw_only=True)
class LorsaLearningConfig(LearningConfig):
    """What learning with attention is told beside."""

    qk_init: str = "random"
    """Where queries and keys start: model, the language model's own heads, or random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qk_init not in ("model", "random"):
            raise GranaryError(f"variant.qk_init={self.qk_init!r}: choose from model, random")


OF_KIND: dict[str, type[LearningConfig]] = {"skip_transcoder": SkipLearningConfig, "lorsa": LorsaLearningConfig}


def learning_of(kind: str) -> type[LearningConfig]:
    """What learning a dictionary of this kind is told; its own keys stand in the config group ``variant``."""
    return OF_KIND.get(kind, LearningConfig)


def check(config: DictionaryConfig, learning: LearningConfig) -> None:
    """Raise GranaryError, one line with the reason, for a way of learning that the dictionary does not allow."""
    _check_sparsity(config, learning)
    _check_maps(config, learning)
    _check_prefixes(config, learning)
    _check_groups(config, learning)
    if learning.encoder_init == "norm_search" and config.unit_norm_decoder:
        raise GranaryError(
            "sae.encoder_init=norm_search looks for the decoder's norm, which sae.unit_norm_decoder=true fixes at 1: "
            "use scaled, or unit_norm_decoder=false"
        )
    if learning.init_subspace is not None and learning.init_subspace > config.widths.d_out:
        raise GranaryError(
            f"sae.init_subspace={learning.init_subspace} is more than the {config.widths.d_out} dimensions"
        )


def _check_maps(config: DictionaryConfig, learning: LearningConfig) -> None:
    """What is about rows that latents write, where there are such."""
    if config.writes_rows:
        return
    for key, is_on in (
        ("prefixes", learning.prefixes is not None),
        ("init_subspace", learning.init_subspace is not None),
        ("encoder_init=norm_search", learning.encoder_init == "norm_search"),
    ):
        if is_on:
            raise GranaryError(
                f"sae.{key} is about rows of the decoder, which a {config.kind} has none of: leave it out"
            )


def _check_groups(config: DictionaryConfig, learning: LearningConfig) -> None:
    """What is written for one group of latents alone."""
    if config.num_groups == 1:
        return
    for key, is_on in (
        ("prefixes", learning.prefixes is not None),
        ("multi_topk_weight", learning.multi_topk_weight > 0),
        ("penalty=tanh_quad", learning.penalty == "tanh_quad"),
        ("init_subspace", learning.init_subspace is not None),
        ("encoder_init=norm_search", learning.encoder_init == "norm_search"),
    ):
        if is_on:
            raise GranaryError(
                f"sae.{key} is for dictionaries of one group of latents, not a {config.kind}: leave it out"
            )


def check_trainable(config: DictionaryConfig, learning: LearningConfig) -> None:
    """Raise GranaryError also for what makes sense but would not become sparse."""
    check(config, learning)
    penalties = ACTIVATION_KINDS[config.activation].penalties
    if penalties and not (learning.penalty != "none" and learning.penalty_weight > 0):
        raise GranaryError(
            f"sae.activation={config.activation} is not sparse without a penalty: set sae.penalty to one of "
            f"{', '.join(penalties)} and sae.penalty_weight above 0"
        )


def _check_sparsity(config: DictionaryConfig, learning: LearningConfig) -> None:
    """k or a penalty, as the activation asks."""
    kind = ACTIVATION_KINDS[config.activation]
    if not kind.is_learnt:
        raise GranaryError(
            f"sae.activation={config.activation} is that of other projects' SAEs, which are read and not trained here: "
            "choose topk"
        )
    if kind.fixes_l0:
        if learning.penalty != "none":
            raise GranaryError(
                f"sae.penalty={learning.penalty} with sae.activation={config.activation}: k fixes how many latents "
                "fire and a penalty would only shrink them; set sae.penalty=none"
            )
    else:
        if learning.penalty not in ("none", *kind.penalties):
            raise GranaryError(
                f"sae.penalty={learning.penalty} with sae.activation={config.activation}: choose from "
                f"{', '.join(kind.penalties)}" + _why_not(config, learning)
            )
        if learning.multi_topk_weight > 0:
            raise GranaryError(
                f"sae.multi_topk_weight={learning.multi_topk_weight} with sae.activation={config.activation}: there "
                "is no k to take a multiple of; set it to 0"
            )
    if learning.penalty == "none" and learning.penalty_weight > 0:
        raise GranaryError(f"sae.penalty_weight={learning.penalty_weight} with sae.penalty=none: choose a penalty")
    if learning.preact_weight > 0 and config.activation != "jumprelu":
        raise GranaryError(
            f"sae.preact_weight={learning.preact_weight} with sae.activation={config.activation}: only jumprelu has "
            "thresholds to pull dead latents towards; set it to 0"
        )


def _why_not(config: DictionaryConfig, learning: LearningConfig) -> str:
    """The reason, where there is more to say than which penalties there are."""
    if learning.penalty == "l0":
        return "; l0 needs jumprelu's straight-through thresholds"
    if learning.penalty == "l1" and config.activation == "jumprelu":
        return "; jumprelu exists to avoid the shrinkage that l1 causes"
    return ""


def _check_prefixes(config: DictionaryConfig, learning: LearningConfig) -> None:
    prefixes = learning.prefixes
    if prefixes is None:
        return
    if not ACTIVATION_KINDS[config.activation].fixes_l0:
        raise GranaryError(
            f"sae.prefixes with sae.activation={config.activation}: Matryoshka groups are for topk and batchtopk"
        )
    if learning.multi_topk_weight > 0:
        raise GranaryError("sae.prefixes and sae.multi_topk_weight both add reconstruction losses: use one of them")
    ascending = list(prefixes) == sorted(set(prefixes)) and prefixes and prefixes[0] >= 1
    if not ascending or prefixes[-1] != config.d_latent:
        raise GranaryError(
            f"sae.prefixes={list(prefixes)}: ascending numbers of latents, the last of them d_latent={config.d_latent}"
        )
