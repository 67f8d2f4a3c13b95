"""comparison.json: what a comparison keeps of several evaluations, and in which order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from stage_eval.results.evaluation import Evaluation, Settings, StoreRecord
from stage_eval.results.figures import ActivationFigures, Figure, Interval, JointDownstream
from stage_eval.results.record import OPTIONAL, Json, Record
from stage_eval.results.supervised import SupervisedOutline

FORMAT = "granary-comparison"


@dataclass(frozen=True, kw_only=True)
class FiringOutline(Record):
    """Latents by bin of log10 firing frequency."""

    log10_edges: list[float]
    latents: list[int]


@dataclass(frozen=True, kw_only=True)
class NearestOutline(Record):
    """Share of the latents by the cosine with their nearest neighbour."""

    edges: list[float]
    nearest: list[float]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(Record):
    """What a comparison keeps of one evaluation."""

    name: str
    path: str
    report: str | None
    """Address of its report, relative to the comparison."""
    hook: str
    activation: str | None
    k: int | None
    expansion: float
    """Latents per dimension of what is written."""
    d_latent: int
    fvu: Figure
    l0: Figure
    dead_fraction: float
    ce_clean: Figure
    ce_spliced: Figure
    ce_zero: Figure
    ce_mean: Figure
    loss_recovered: Figure
    kl: Figure
    n_tokens: int
    n_contexts: int
    cosine: Figure
    fvu_per_dimension_mean: Figure
    dense_fraction: float
    duplicates: Figure
    sha256: str
    frequency: FiringOutline
    nearest: NearestOutline | None
    confidence95: dict[str, Interval | None]
    supervised: SupervisedOutline | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class ConfigSummary(Record):
    """The settings that all SAEs share, and the names of those that differ."""

    common: Json
    different: list[str]


@dataclass(frozen=True, kw_only=True)
class LeftOut(Record):
    """A folder that was asked for and could not be evaluated."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """Several evaluations side by side, of the same contexts of the same store."""

    format: str
    definitions: int
    created: str
    store: StoreRecord
    model: Json
    corpus: Json
    settings: Settings
    activations: dict[str, ActivationFigures]
    configs: ConfigSummary
    rows: list[ComparisonRow]
    joint: JointDownstream | None
    left_out: list[LeftOut]

    @property
    def by_site(self) -> dict[str, list[ComparisonRow]]:
        """The rows by site: errors and losses at different sites can't be ranked against one another."""
        groups: dict[str, list[ComparisonRow]] = {}
        for row in self.rows:
            groups.setdefault(row.hook, []).append(row)
        return groups


def compare(
    evaluations: Sequence[Evaluation],
    links: Sequence[str | None],
    joint: JointDownstream | None = None,
    left_out: Sequence[LeftOut] = (),
) -> Comparison:
    """Put the evaluations side by side; `links` are the reports' addresses relative to the page.

    `joint`: the losses with all SAEs spliced in at once, where that was asked for.
    """
    rows = [comparison_row(evaluation, link) for evaluation, link in zip(evaluations, links, strict=True)]
    rows.sort(key=lambda row: (row.hook, row.expansion, row.k or 0, row.l0 or 0.0, row.name))
    first = evaluations[0]
    return Comparison(
        format=FORMAT,
        definitions=first.definitions,
        created=first.created,
        store=first.provenance.store,
        model=first.provenance.model,
        corpus=first.provenance.corpus,
        settings=first.settings,
        activations={site: figures for one in evaluations for site, figures in one.described.items()},
        configs=common_and_different([evaluation.sae.config for evaluation in evaluations]),
        rows=rows,
        joint=joint,
        left_out=list(left_out),
    )


def comparison_row(evaluation: Evaluation, link: str | None) -> ComparisonRow:
    """What a comparison keeps of one evaluation."""
    sae, decoder, downstream = evaluation.sae, evaluation.decoder, evaluation.downstream
    intervals = {"fvu": evaluation.reconstruction.confidence95["fvu"]}
    if downstream is not None:
        intervals |= {name: downstream.confidence95[name] for name in ("loss_recovered", "kl")}
    histogram = evaluation.latents.histogram
    return ComparisonRow(
        name=sae.name,
        path=sae.path,
        report=link,
        hook=sae.hook,
        activation=sae.activation,
        k=sae.k,
        expansion=evaluation.latents.d_latent / sae.widths[1],
        d_latent=evaluation.latents.d_latent,
        fvu=evaluation.fvu,
        l0=evaluation.l0,
        dead_fraction=evaluation.dead_fraction,
        ce_clean=evaluation.ce_clean,
        ce_spliced=evaluation.ce_spliced,
        ce_zero=evaluation.ce_zero,
        ce_mean=evaluation.ce_mean,
        loss_recovered=evaluation.loss_recovered,
        kl=evaluation.kl,
        n_tokens=evaluation.n_tokens,
        n_contexts=evaluation.reconstruction.n_contexts,
        cosine=evaluation.reconstruction.cosine,
        fvu_per_dimension_mean=evaluation.reconstruction.fvu_per_dimension_mean,
        dense_fraction=evaluation.latents.dense_fraction,
        duplicates=decoder.duplicates if decoder is not None else None,
        sha256=evaluation.provenance.sae.sha256,
        frequency=FiringOutline(log10_edges=histogram.log10_edges, latents=histogram.latents),
        nearest=NearestOutline(edges=decoder.edges, nearest=decoder.nearest) if decoder is not None else None,
        confidence95=intervals,
        supervised=None if evaluation.supervised is None else SupervisedOutline.of(evaluation.supervised),
    )


def common_and_different(configs: Sequence[Json]) -> ConfigSummary:
    """Split the settings of several configurations by whether all agree."""
    common = {key: value for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}
    return ConfigSummary(common=common, different=sorted({key for config in configs for key in config} - set(common)))


def least_fvu(rows: Sequence[ComparisonRow]) -> ComparisonRow:
    """The row of the least FVU; rows without one come last."""
    return min(rows, key=lambda row: math.inf if row.fvu is None else row.fvu)
