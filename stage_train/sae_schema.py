"""Schema of the config group ``sae``; the values are in ``conf/sae``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import MISSING

from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.learn.config import LearningConfig, check_trainable
from shared.sae.sites import Sites, SiteWidths

# Gao et al. 2024: ten million tokens, in runs of billions. A run of a few million would end before AuxK began.
MOST_DEAD_AFTER = 10_000_000


@dataclass(kw_only=True)
class SAESchema:
    """Group ``sae``: activation and learning of a dictionary, with the width given by ``expansion`` or ``d_latent``."""

    k: int | None = MISSING
    """Active latents per token, for topk and batchtopk; null for the others."""
    expansion: float = MISSING
    """Latents per dimension of the activations: F = expansion * d_model."""
    d_latent: int | None = None
    """Number of latents; overrides expansion."""
    activation: str = MISSING
    """Which latents fire: topk, batchtopk, relu, jumprelu or gated."""
    prefixes: list[float] | None = None
    """Matryoshka groups: shares of the latents up to 1.0, ascending; null for none."""
    normalisation: str = MISSING
    """none, scale, centre_scale or layer_norm."""
    shift_back: bool = MISSING
    """Undo layer_norm on the reconstruction; false reconstructs raw activations from normalised ones."""
    pre_bias: bool = MISSING
    """Subtract b_dec before the encoder."""
    unit_norm_decoder: bool = MISSING
    """Keep decoder rows at unit norm; false: their norm is free and weighs the penalty."""
    loss: str = MISSING
    """fvu or fvu_per_dim."""
    auxk_alpha: float = MISSING
    """Weight of the AuxK loss on dead latents; 0 turns it off."""
    auxk_k: int | None = None
    """Dead latents per token in the AuxK loss; null: d_model / 2."""
    multi_topk_weight: float = MISSING
    """Weight of the loss with multi_topk_factor * k latents; 0 turns it off."""
    multi_topk_factor: int = MISSING
    """How many times k the Multi-TopK loss uses."""
    penalty: str = MISSING
    """Sparsity penalty: none, l0, l1, tanh or tanh_quad; which of them depends on the activation."""
    penalty_weight: float = MISSING
    """Its weight; the reconstruction loss counts 1."""
    tanh_scale: float = MISSING
    """c in tanh(c f)."""
    frequency_scale: float = MISSING
    """s in tanh_quad: p (1 + p / s), with p the batch's mean of tanh(c f)."""
    bandwidth: float = MISSING
    """Width of jumprelu's straight-through window."""
    threshold_init: float = MISSING
    """jumprelu's thresholds at the start."""
    preact_weight: float = MISSING
    """Weight of jumprelu's penalty on how far dead latents are below their thresholds; 0 turns it off."""
    threshold_decay: float = MISSING
    """How much of batchtopk's inference threshold is kept per step."""
    dead_after_tokens: int | str = MISSING
    """A latent without a nonzero activation for this many tokens is dead; auto: a twentieth of the run, up to 10 M."""
    bias_init: str = MISSING
    """What b_dec starts at: zero, mean or geometric_median."""
    encoder_init: str = MISSING
    """scaled, transpose or norm_search."""
    init_subspace: int | None = None
    """Principal directions of the sample that decoder rows start in; null: all of space."""

    def to_configs(
        self, variant: Mapping[str, Any], sites: Sites, widths: SiteWidths, run_tokens: int | None = None
    ) -> tuple[DictionaryConfig, LearningConfig]:
        """The dictionary and how it is learnt; raises GranaryError when they make no sense, or not together.

        `variant` is the config group of that name: the kind, and what only that kind has. `run_tokens` is the length
        of the run that ``dead_after_tokens=auto`` is a share of; None: a long one.
        """
        if self.d_latent is None and not self.expansion > 0:
            raise GranaryError(f"sae.expansion={self.expansion}: must be positive")
        d_latent = self.d_latent if self.d_latent is not None else round(self.expansion * widths.d_in)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["d_latent"] = d_latent
        given["prefixes"] = self._latents_of_prefixes(d_latent)
        given["dead_after_tokens"] = self._dead_after_tokens(run_tokens)
        artefact = {field.name for field in fields(DictionaryConfig)}
        options = {name: value for name, value in variant.items() if name != "kind"}
        own = {name: value for name, value in given.items() if name in artefact}
        config = kind_of(str(variant["kind"])).of(widths, {**own, **options}, sites)
        learning = LearningConfig(**{field.name: given[field.name] for field in fields(LearningConfig)})
        check_trainable(config, learning)
        return config, learning

    def _dead_after_tokens(self, run_tokens: int | None) -> int:
        """The number, or what ``auto`` stands for."""
        if self.dead_after_tokens == "auto":
            return MOST_DEAD_AFTER if run_tokens is None else max(1, min(MOST_DEAD_AFTER, run_tokens // 20))
        if isinstance(self.dead_after_tokens, str):
            raise GranaryError(
                f"sae.dead_after_tokens={self.dead_after_tokens}: give a number of tokens, or auto for a twentieth of "
                "the run, at most 10 M"
            )
        return self.dead_after_tokens

    def _latents_of_prefixes(self, d_latent: int) -> tuple[int, ...] | None:
        if self.prefixes is None:
            return None
        for share in self.prefixes:
            if not 0 < share <= 1:
                raise GranaryError(f"sae.prefixes={self.prefixes}: shares of the latents, above 0 and up to 1.0")
        return tuple(max(1, round(share * d_latent)) for share in self.prefixes)


def kind_of(name: str) -> type[DictionaryConfig]:
    """The config class of a variant; raises GranaryError, naming those there are, for another name."""
    from shared.sae.variants import VARIANTS  # torch: too heavy for a module that checks keys

    if name not in VARIANTS:
        raise GranaryError(f"variant.kind={name}: choose from {', '.join(VARIANTS)}")
    return VARIANTS[name].config_class
