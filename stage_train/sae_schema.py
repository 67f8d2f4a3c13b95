"""Schema of the config group ``sae``; the values are in ``conf/sae``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from omegaconf import MISSING

from shared.basics.config import key
from shared.basics.errors import GranaryError
from shared.sae.config import DictionaryConfig
from shared.sae.learn.config import LearningConfig, check_trainable, learning_of
from shared.sae.sites import Sites, SiteWidths

# Gao et al. 2024: ten million tokens, in runs of billions. A run of a few million would end before AuxK began.
MOST_DEAD_AFTER = 10_000_000
# Latents per dimension from which many die without a slope in AuxK, and that slope (docs/log.md).
WIDE, WIDE_AUXK_SLOPE = 64, 0.3


@dataclass(kw_only=True)
class SAESchema:
    """Group ``sae``: activation and learning of a dictionary, with the width given by ``expansion`` or ``d_latent``."""

    documented_in: ClassVar[tuple[type, ...]] = (DictionaryConfig, LearningConfig)
    """Where a field that has no docstring here has its one."""

    k: int | None = MISSING
    expansion: float | None = MISSING
    """Latents per dimension of the activations that are read: F = expansion * d_model; null where variant.* says how
    many there are."""
    d_latent: int | None = key(count=True)
    """Number of latents, F; overrides expansion."""
    activation: str = MISSING
    prefixes: list[float] | None = MISSING
    """Matryoshka (Bussmann et al. 2025), for topk and batchtopk: the reconstruction loss is the sum of those with these
    shares of the latents alone, ascending up to 1.0; null: the whole dictionary alone."""
    normalisation: str = MISSING
    shift_back: bool = MISSING
    pre_bias: bool = MISSING
    unit_norm_decoder: bool = MISSING
    loss: str = MISSING
    auxk_alpha: float = MISSING
    auxk_k: int | None = MISSING
    auxk_slope: int | float | str = MISSING
    """Slope below 0 of the ReLU that dead latents go through in AuxK; 0, as Gao et al. 2024: a latent below 0 on every
    token stays dead; auto: 0.3 from 64 latents per dimension on, where many would, else 0."""
    multi_topk_weight: float = MISSING
    multi_topk_factor: int = MISSING
    penalty: str = MISSING
    penalty_weight: float = MISSING
    tanh_scale: float = MISSING
    frequency_scale: float = MISSING
    bandwidth: float = MISSING
    threshold_init: float = MISSING
    preact_weight: float = MISSING
    threshold_decay: float = MISSING
    dead_after_tokens: int | str = key(count=True)
    """A latent that has not been nonzero on this many tokens is dead; auto: a twentieth of the run, up to 10 M."""
    bias_init: str = MISSING
    encoder_init: str = MISSING
    init_subspace: int | None = MISSING

    def to_configs(
        self, variant: Mapping[str, Any], sites: Sites, widths: SiteWidths, run_tokens: int | None = None
    ) -> tuple[DictionaryConfig, LearningConfig]:
        """The dictionary and how it is learnt; raises GranaryError when they make no sense, or not together.

        `variant` is the config group of that name: the kind, and what only that kind has. `run_tokens` is the length
        of the run that ``dead_after_tokens=auto`` is a share of; None: a long one.
        """
        options = {name: value for name, value in variant.items() if name != "kind"}
        kind = kind_of(str(variant["kind"]))
        if kind.unit != sites.unit:
            raise GranaryError(
                f"variant={kind.kind} learns from whole contexts, which a store alone gives: granary train, not fit"
            )
        d_latent = self._num_latents(kind, options, widths)
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["d_latent"] = d_latent
        given["prefixes"] = self._latents_of_prefixes(d_latent)
        given["dead_after_tokens"] = self._dead_after_tokens(run_tokens)
        given["auxk_slope"] = self._auxk_slope(d_latent / widths.d_in)
        artefact = {field.name for field in fields(DictionaryConfig)}
        own = {name: value for name, value in given.items() if name in artefact}
        common = {field.name for field in fields(LearningConfig)}
        how = learning_of(kind.kind)
        taught = {field.name for field in fields(how)} - common
        structure = {name: value for name, value in options.items() if name not in taught}
        config = kind.of(widths, {**own, **structure}, sites)
        learning = how(
            **{name: given[name] for name in common},
            **{name: value for name, value in options.items() if name in taught},
        )
        check_trainable(config, learning)
        return config, learning

    def _num_latents(self, kind: type[DictionaryConfig], structure: Mapping[str, Any], widths: SiteWidths) -> int:
        """As ``d_latent``, the variant's own keys, or ``expansion`` say."""
        of_structure = kind.latents_of(structure)
        if of_structure is not None:
            if self.expansion is not None or self.d_latent not in (None, of_structure):
                raise GranaryError(
                    f"variant={kind.kind} says itself how many latents there are, {of_structure}: set sae.expansion "
                    "and sae.d_latent to null"
                )
            return of_structure
        if self.d_latent is not None:
            return self.d_latent
        if self.expansion is None or not self.expansion > 0:
            raise GranaryError(f"sae.expansion={self.expansion}: must be positive")
        return round(self.expansion * widths.d_in)

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

    def _auxk_slope(self, latents_per_dimension: float) -> float:
        """The number, or what ``auto`` stands for."""
        if self.auxk_slope == "auto":
            return auxk_slope_of(latents_per_dimension)
        if isinstance(self.auxk_slope, str):
            raise GranaryError(
                f"sae.auxk_slope={self.auxk_slope}: give a number, or auto for {WIDE_AUXK_SLOPE} from {WIDE} latents "
                "per dimension on and else 0"
            )
        return float(self.auxk_slope)

    def _latents_of_prefixes(self, d_latent: int) -> tuple[int, ...] | None:
        if self.prefixes is None:
            return None
        for share in self.prefixes:
            if not 0 < share <= 1:
                raise GranaryError(f"sae.prefixes={self.prefixes}: shares of the latents, above 0 and up to 1.0")
        return tuple(max(1, round(share * d_latent)) for share in self.prefixes)


def auxk_slope_of(latents_per_dimension: float) -> float:
    """What ``sae.auxk_slope=auto`` stands for."""
    return WIDE_AUXK_SLOPE if latents_per_dimension >= WIDE else 0.0


def kind_of(name: str) -> type[DictionaryConfig]:
    """The config class of a variant; raises GranaryError, naming those there are, for another name."""
    from shared.sae.variants import VARIANTS  # torch: too heavy for a module that checks keys

    if name not in VARIANTS:
        raise GranaryError(f"variant.kind={name}: choose from {', '.join(VARIANTS)}")
    return VARIANTS[name].config_class
