"""What a dictionary is: every choice that its outputs depend on. How it was learnt is ``shared.sae.learn.config``'s."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from shared.basics.documents import typed
from shared.basics.errors import GranaryError
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.sites import Sites, SiteWidths, Unit

NOT_AN_SAE = "an SAE reads one site and gives it back"
# The width, and the number of latents, of a config that has none yet; and a width beyond all that there is.
OPEN = 0
HIGHEST_WIDTH = 1 << 20
NORMALISATIONS = ("none", "scale", "centre_scale", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """What all kinds of dictionary have; each kind adds its widths.

    Raises GranaryError when a field is out of its range or two fields contradict each other.
    """

    kind: ClassVar[str]
    """Name of the variant, as ``conf/variant`` and ``config.json`` give it."""
    width_fields: ClassVar[tuple[str, ...]]
    """Fields that follow from the widths of the sites."""
    unit: ClassVar[Unit] = "token"
    """What one row of its input is."""

    d_latent: int
    """Number of latents, F."""
    k: int | None = None
    """Active latents per token, for topk and batchtopk; null for the others."""
    activation: str = "topk"
    """One of ``shared.sae.activation_kinds``: topk, batchtopk, relu, jumprelu, gated; signed_topk is only read."""
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
    sites: Sites | None = None
    """Where it reads and writes, where that is known."""

    def __post_init__(self) -> None:
        for name in ("d_latent", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GranaryError(f"sae.{name}={value}: must be at least 1")
        for side in (self.widths.reads, self.widths.writes):
            if not side or min(side) < 1:
                raise GranaryError(f"sae.d_model={min(side, default=0)}: must be at least 1")
        for name, choices in (("activation", tuple(ACTIVATION_KINDS)), ("normalisation", NORMALISATIONS)):
            if getattr(self, name) not in choices:
                raise GranaryError(f"sae.{name}={getattr(self, name)!r}: choose from {', '.join(choices)}")
        self._check_k()
        if not self.shift_back and self.normalisation != "layer_norm":
            raise GranaryError("sae.shift_back=false is for normalisation=layer_norm alone")
        if not self.is_autoencoder:
            self._check_two_places()
        if self.sites is not None and self.sites.unit != self.unit:
            raise GranaryError(
                f"a {self.kind} reads one {self.unit} at a time; its sites are given as those of a {self.sites.unit}"
            )

    def _check_k(self) -> None:
        """Whether k is given where the activation needs it, and only there."""
        if not ACTIVATION_KINDS[self.activation].fixes_l0:
            if self.k is not None:
                raise GranaryError(
                    f"sae.k={self.k} with sae.activation={self.activation}: its sparsity comes from "
                    "sae.penalty_weight; set sae.k=null"
                )
            return
        if self.k is None:
            raise GranaryError(f"sae.activation={self.activation} needs sae.k, the active latents per token")
        if self.k > self.d_latent:
            raise GranaryError(
                f"sae.k={self.k} is more than the {self.d_latent} latents: lower sae.k or raise sae.expansion"
            )

    def _check_two_places(self) -> None:
        """What makes sense only where the dictionary gives back what it reads."""
        if self.pre_bias:
            raise GranaryError(
                "sae.pre_bias=true subtracts b_dec, which lies in the space that is written, from what is read: set "
                "sae.pre_bias=false where reads and writes differ"
            )
        if self.normalisation == "layer_norm":
            raise GranaryError(
                "sae.normalisation=layer_norm scales back by what was read, which says nothing of another place: use "
                "centre_scale, scale or none where reads and writes differ"
            )

    @property
    def widths(self) -> SiteWidths:
        """Features of each site that is read and written."""
        raise NotImplementedError

    @property
    def is_autoencoder(self) -> bool:
        """Whether it must give back what it reads."""
        return True

    @property
    def follows_depth(self) -> bool:
        """Whether what it writes at its i-th site depends on the first i that it reads alone."""
        return False

    @property
    def num_groups(self) -> int:
        """Groups of latents, of d_latent / num_groups each, that read and write places of their own."""
        return 1

    @property
    def writes_rows(self) -> bool:
        """Whether a latent adds a row of its own times its value; else what it adds depends on what was read."""
        return True

    @property
    def decoder_rows(self) -> int:
        """Rows of the decoder, by which learning rates go that depend on its size."""
        return self.d_latent

    def check_parts(self, parts: int) -> None:
        """Raise GranaryError where its latents, equally many in each of `parts`, are not such parts in all else."""

    @classmethod
    def latents_of(cls, structure: Mapping[str, Any]) -> int | None:
        """How many latents its own keys say that there are; None: as many as the user wants."""
        return None

    def own_fields(self) -> dict[str, Any]:
        """What it was made from beside widths and sites, in plain JSON types, keyed by field name."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name in self.field_names()}

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names of the fields beside widths and sites, of the kind's own among them."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in ("sites", *cls.width_fields))

    @classmethod
    def of(cls, widths: SiteWidths, fields: Mapping[str, Any], sites: Sites | None = None) -> Self:
        """The config of this kind for sites of these widths; raises GranaryError for a key that it does not have."""
        unknown = sorted(set(fields) - set(cls.field_names()))
        if unknown:
            raise GranaryError(
                f"the {cls.kind} config has unknown keys {', '.join(unknown)}: is it from a newer version?"
            )
        hints, where = typing.get_type_hints(cls), f"the {cls.kind} config"
        if "d_latent" not in fields:
            raise GranaryError(f"{where} is incomplete: it lacks 'd_latent'")
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        given = {name: typed(hints[name], value, f"{where}: {name}") for name, value in plain.items()}
        try:
            return cls(**cls.from_widths(widths), **given, sites=sites)
        except TypeError as error:
            raise GranaryError(f"the {cls.kind} config is incomplete or of a wrong type: {error}") from None

    @classmethod
    def from_widths(cls, widths: SiteWidths) -> dict[str, Any]:
        """The kind's `width_fields` for sites of these widths; raises GranaryError for what it can't be made for."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SAEConfig(DictionaryConfig):
    """A sparse autoencoder: it reads one site and must give it back.

    Without `d_model` it is open: ``SAEConfig(k=32, expansion=8)`` becomes one of a width by ``for_width``.
    """

    kind: ClassVar[str] = "sae"
    width_fields: ClassVar[tuple[str, ...]] = ("d_model", "expansion")

    d_model: int = OPEN
    """Width of the activations."""
    d_latent: int = OPEN
    expansion: float | None = None
    """Latents per feature of an open config, in the place of d_latent; null once the width is known."""

    def __post_init__(self) -> None:
        if self.expansion is not None and not self.expansion > 0:
            raise GranaryError(f"sae.expansion={self.expansion}: must be positive")
        if self.expansion is not None and self.d_latent != OPEN:
            raise GranaryError("expansion and d_latent both say how many latents there are: give one")
        if self.is_open:
            self.for_width(HIGHEST_WIDTH)  # what is wrong at any width is told at once
            return
        if self.expansion is not None:
            object.__setattr__(self, "d_latent", round(self.expansion * self.d_model))
            object.__setattr__(self, "expansion", None)
        super().__post_init__()
        if self.sites is not None and not (self.sites.is_autoencoder and len(self.sites.reads) == 1):
            raise GranaryError(f"{NOT_AN_SAE}, not {self.sites}: use variant=transcoder for two places")

    @property
    def is_open(self) -> bool:
        """Whether the width is not known yet."""
        return self.d_model == OPEN and (self.expansion is not None or self.d_latent != OPEN)

    def for_width(self, d_model: int) -> "SAEConfig":
        """The same of activations that are `d_model` wide; raises GranaryError where this one is of another width."""
        if not self.is_open and self.d_model != d_model:
            raise GranaryError(f"the SAE is for activations of width {self.d_model}, these have {d_model}")
        return dataclasses.replace(self, d_model=d_model)

    @property
    def widths(self) -> SiteWidths:
        """One site, read and written. Raises GranaryError while it is open."""
        if self.is_open:
            raise GranaryError("this SAEConfig has no width yet: give d_model=..., or attach it to a module")
        return SiteWidths((self.d_model,), (self.d_model,))

    @classmethod
    def from_widths(cls, widths: SiteWidths) -> dict[str, Any]:
        """One width, read and written."""
        if widths.reads != widths.writes or len(widths.reads) != 1:
            raise GranaryError(f"{NOT_AN_SAE}: use variant=transcoder for two places")
        return {"d_model": widths.reads[0]}
