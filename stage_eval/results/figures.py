"""What each measurement finds. The field names are the keys of eval.json; their formulas are in docs/metrics.md.

None stands for a figure that is undefined, such as the share of firings where nothing fired.
"""

from dataclasses import dataclass, field

from stage_eval.results.record import OPTIONAL, Record

Interval = tuple[float, float]
"""Low and high end of a 95 % confidence interval over contexts."""
Figure = float | None


@dataclass(frozen=True, kw_only=True)
class WithBos(Record):
    """FVU when BOS positions are counted too, and on them alone."""

    fvu: Figure
    fvu_uncentred: Figure
    bos_fvu_uncentred: Figure
    n_bos: int
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class SiteFigures(Record):
    """How well one of several written sites is reproduced."""

    fvu: Figure
    mse: Figure


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Record):
    """How well what the dictionary must produce is reproduced, over the evaluated tokens."""

    fvu: Figure
    fvu_uncentred: Figure
    mse_per_token: Figure
    cosine: Figure
    relative_norm: Figure
    reconstruction_bias: Figure
    l0: Figure
    l1: Figure
    explained_variance: Figure
    explained_variance_uncentred: Figure
    fvu_per_dimension_mean: Figure
    explained_variance_per_dimension_mean: Figure
    constant_dimensions: int
    mse: Figure
    mean_error_norm: Figure
    with_bos: WithBos | None
    n_tokens: int
    n_contexts: int
    confidence95: dict[str, Interval | None]
    sites: dict[str, SiteFigures] | None = field(default=None, metadata=OPTIONAL)
    """By written site, where there are several."""


@dataclass(frozen=True, kw_only=True)
class DenseLatent(Record):
    """One of the latents that fire most often."""

    latent: int
    frequency: float
    mean_activation: float


@dataclass(frozen=True, kw_only=True)
class FrequencyHistogram(Record):
    """Latents, and the share of all squared activation, by bin of log10 firing frequency; dead latents are in none."""

    log10_edges: list[float]
    latents: list[int]
    energy_share: list[float]


@dataclass(frozen=True, kw_only=True)
class LatentFigures(Record):
    """How often and how strongly latents fire."""

    d_latent: int
    dead: int
    dense: int
    dead_fraction: float
    dense_fraction: float
    dense_frequency_bound: float
    firings_of_dense_latents: float
    median_frequency_alive: Figure
    mean_activation_when_active: Figure
    max_activation: Figure
    densest: list[DenseLatent]
    histogram: FrequencyHistogram


@dataclass(frozen=True, kw_only=True)
class DecoderFigures(Record):
    """How the decoder directions lie to one another."""

    sampled: int
    edges: list[float]
    nearest: list[float]
    nearest_random: list[float]
    nearest_median: Figure
    duplicates: float
    duplicate_cosine: float
    encoder_cosine_mean: Figure
    """None where encoder and decoder live in different spaces."""


@dataclass(frozen=True, kw_only=True)
class Downstream(Record):
    """What the language model loses with the reconstruction, zero or the mean in place of the activation."""

    ce_clean: Figure
    ce_spliced: Figure
    ce_zero: Figure
    ce_mean: Figure
    ce_increase: Figure
    loss_recovered: Figure
    loss_recovered_over_mean: Figure
    kl: Figure
    kl_zero: Figure
    kl_mean: Figure
    kl_recovered: Figure
    top1_agreement: Figure
    n_predictions: int
    confidence95: dict[str, Interval | None]


@dataclass(frozen=True, kw_only=True)
class JointDownstream(Downstream):
    """The same with several dictionaries spliced in at once."""

    hooks: list[str]


@dataclass(frozen=True, kw_only=True)
class DiffFigures(Record):
    """What a crosscoder's latents say of the difference of its two sites, over the latents that fired."""

    first: str
    second: str
    alive: int
    only_first: int
    """Relative norm below the first of `cuts`."""
    only_second: int
    """Above the last."""
    shared: int
    """Between the two in the middle."""
    between: int
    specific_first: int
    """Of the first site by latent scaling: the other's shares lie below both bounds."""
    specific_second: int
    cuts: list[float]
    most_nu_reconstruction: float
    most_nu_error: float
    shared_cosine_mean: Figure
    edges: list[float]
    latents: list[int]
    """Latents by relative norm: those from ``edges[i]`` up to ``edges[i + 1]``."""


@dataclass(frozen=True, kw_only=True)
class GroupFigures(Record):
    """Figures of every group of tokens; group i reaches from ``edges[i]`` up to ``edges[i + 1]``."""

    edges: list[float]
    tokens: list[int]
    fvu: list[Figure]
    predictions: list[int] | None = field(default=None, metadata=OPTIONAL)
    ce_clean: list[Figure] | None = field(default=None, metadata=OPTIONAL)
    ce_increase: list[Figure] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class TokenKindFigures(Record):
    """Figures of the tokens of one kind: text, regions of images, or what the assistant said."""

    tokens: int
    fvu: Figure
    """About the mean of the kind itself."""
    mean_norm: Figure


@dataclass(frozen=True, kw_only=True)
class Breakdown(Record):
    """Figures by position in the document and by how common the token is."""

    position: GroupFigures
    frequency: GroupFigures
    kind: dict[str, TokenKindFigures] | None = field(default=None, metadata=OPTIONAL)
    """Of a store with images."""


@dataclass(frozen=True, kw_only=True)
class MassiveDimension(Record):
    """A dimension whose RMS is many times the median dimension's."""

    dimension: int
    rms_ratio: float


@dataclass(frozen=True, kw_only=True)
class StoreNorms(Record):
    """Percentiles of the norm at positions `first` to `last` of the store's training contexts."""

    first: int
    last: int
    tokens: int
    p5: Figure
    p50: Figure
    p95: Figure
    p99: Figure


@dataclass(frozen=True, kw_only=True)
class Spectrum(Record):
    """Standard deviation and absolute mean of the dimensions at these ranks, each in falling order."""

    rank: list[int]
    std: list[float]
    abs_mean: list[float]


@dataclass(frozen=True, kw_only=True)
class NormGroups(Record):
    """Percentiles of the norm on the evaluated tokens, by position."""

    edges: list[float]
    tokens: list[int]
    p5: list[Figure]
    p50: list[Figure]
    p95: list[Figure]
    p99: list[Figure]
    max: list[Figure]


@dataclass(frozen=True, kw_only=True)
class BosNorm(Record):
    """Norms at BOS positions, which no other figure contains."""

    tokens: int
    p50: Figure
    max: Figure


@dataclass(frozen=True, kw_only=True)
class LargeDimension(Record):
    """A dimension that reaches far on the evaluated tokens."""

    dimension: int
    max: float
    max_bos: float
    rms: float
    energy_share: float


@dataclass(frozen=True, kw_only=True)
class LargestDimensions(Record):
    """The dimensions of the largest magnitude, against the RMS of the median dimension."""

    median_rms: float
    massive: int | None
    massive_ratio: float
    dimensions: list[LargeDimension]


@dataclass(frozen=True, kw_only=True)
class ActivationFigures(Record):
    """What the activations of a site are like: over the store's training tokens, then over the evaluated ones."""

    count: int
    mean_norm: Figure = field(default=None, metadata=OPTIONAL)
    rms_norm: Figure = field(default=None, metadata=OPTIONAL)
    median_norm: Figure = field(default=None, metadata=OPTIONAL)
    max_norm: Figure = field(default=None, metadata=OPTIONAL)
    relative_squared_error: Figure = field(default=None, metadata=OPTIONAL)
    norm_of_mean: Figure
    total_variance: Figure
    variance_in_largest: Figure
    massive_dimensions: list[MassiveDimension]
    store_norm_by_position: list[StoreNorms]
    spectrum: Spectrum
    norm_by_position: NormGroups
    bos_norm: BosNorm | None
    largest: LargestDimensions
