"""The report of one evaluation: a self-contained HTML page made from what eval.json holds."""

from collections.abc import Sequence

from shared.basics.pages_link import slot
from shared.store.statistics import OUTLIER_RATIO
from stage_eval.results.evaluation import Evaluation
from stage_eval.results.figures import (
    ActivationFigures,
    DenseLatent,
    DiffFigures,
    Downstream,
    MassiveDimension,
    Reconstruction,
)
from stage_eval.show import page
from stage_eval.show.page import text
from stage_eval.show.plots import activation_plots, evaluation_plots, numbered
from stage_eval.show.supervised import supervised_section
from stage_eval.show.text import number, percent, short, signed, small_sample
from stage_eval.show.theme import Plot

MetricRows = Sequence[tuple[str, str, str]]
"""(field, heading, meaning) of each metric of a table."""

RECONSTRUCTION_ROWS = (
    ("fvu", "FVU", "squared error over variance about the evaluated tokens' mean, a ratio of sums"),
    ("fvu_per_dimension_mean", "FVU, mean of dimensions", "every residual dimension counts the same"),
    ("explained_variance", "Explained variance", "1 - FVU"),
    ("explained_variance_uncentred", "Explained variance, uncentred", "1 - squared error over squared norm"),
    ("mse", "MSE", "per token and dimension"),
    ("cosine", "Cosine", "between activation and reconstruction, mean over tokens"),
    ("relative_norm", "Relative norm", "length of the reconstruction over the activation's, mean over tokens"),
    (
        "reconstruction_bias",
        "Reconstruction bias",
        "1 where the length is right on average; below 1 is shrinkage",
    ),
)
DOWNSTREAM_ROWS = (
    ("ce_clean", "Cross-entropy, clean", "nats per token"),
    ("ce_spliced", "Cross-entropy, spliced", "with the reconstruction in place of the activation"),
    ("ce_mean", "Cross-entropy, mean-ablated", "every replaced position gets the training mean"),
    ("ce_zero", "Cross-entropy, zero-ablated", "every replaced position gets zero"),
    ("loss_recovered", "Loss recovered", "share of the zero-ablation's damage that the reconstruction avoids"),
    ("loss_recovered_over_mean", "Loss recovered over the mean", "the same against mean ablation"),
    ("kl", "KL divergence", "clean to spliced, nats per token"),
    ("kl_recovered", "KL recovered", "1 - KL spliced over KL zero-ablated"),
    ("top1_agreement", "Top-1 agreement", "predictions whose most likely token is unchanged"),
)

INSPECTION = (
    "What each latent fires on, the tokens it raises and its neighbours: granary inspect finds them, granary explore"
    " shows them, a page for each latent; granary explore RUN --folder writes pages that are linked from here."
)


def render(report: Evaluation) -> str:
    """The page of an evaluation."""
    sae, downstream, reconstruction = report.sae, report.downstream, report.reconstruction
    plots = {plot.name: plot for plot in evaluation_plots(report)}
    losses = []
    if downstream is not None:
        losses.append(
            page.section(
                "What the model loses",
                page.paragraph(splice_sentence(report)),
                page.columns(page.figure(plots["cross_entropy"]), metric_rows(downstream, DOWNSTREAM_ROWS)),
            )
        )
    sections = [
        headline(report),
        *losses,
        page.section(
            "Reconstruction",
            metric_rows(reconstruction, RECONSTRUCTION_ROWS),
            bos_sentence(reconstruction),
            site_rows(reconstruction),
            kind_rows(report),
        ),
        *([] if report.differences is None else [differences(report.differences)]),
        *([] if report.supervised is None else [supervised_section(report.supervised)]),
        page.section(
            "Where it errs",
            page.figures(
                pick(plots, "fvu_by_position", "loss_by_position", "fvu_by_frequency", "loss_by_frequency"),
            ),
        ),
        page.section(
            "Latents and training",
            page.columns(
                *map(page.figure, pick(plots, "firing_frequency", "decoder_cosine")),
                densest_rows(report.latents.densest),
                *map(page.figure, pick(plots, "training")),
            ),
            f'<div style="margin-top:12px">{page.paragraph(INSPECTION)}{slot(".")}</div>',
        ),
        *(
            page.section(
                "The activations themselves" if index == 0 else f"The activations of {site}",
                page.columns(
                    *map(page.figure, numbered(activation_plots(figures), index)),
                    activation_rows(figures),
                ),
            )
            for index, (site, figures) in enumerate(report.described.items())
        ),
        page.section("Where it comes from", provenance(report)),
        page.section(
            "Details",
            definitions(),
            page.folded_json("SAE configuration", sae.config),
            page.folded_json("Evaluation settings", report.settings.to_json()),
            page.folded_json("Provenance in full", report.provenance.to_json()),
            page.folded_json("Software and machine", report.environment.to_json()),
        ),
    ]
    return page.page(sae.name, "SAE evaluation", subtitle(report), sections, footer(report))


def headline(report: Evaluation) -> str:
    """The cards at the top, and a remark where they rest on few tokens."""
    reconstruction, latents, downstream = report.reconstruction, report.latents, report.downstream
    fvu = ("FVU", number(report.fvu), spread(reconstruction, "fvu"))
    sparsity = ("L0", number(report.l0, 4), f"of {latents.d_latent:,} latents")
    if downstream is None:
        quality = [fvu, ("Cosine", number(reconstruction.cosine), spread(reconstruction, "cosine")), sparsity]
    else:
        quality = [
            ("Loss recovered", number(report.loss_recovered), spread(downstream, "loss_recovered")),
            fvu,
            sparsity,
            ("Added loss", signed(downstream.ce_increase), f"{number(report.ce_clean)} clean, nats per token"),
            ("KL to clean", number(report.kl), "nats per token"),
        ]
    cards = page.cards(
        [
            *quality,
            ("Dead latents", percent(report.dead_fraction), f"{latents.dead:,} never fired"),
            ("Dense latents", percent(latents.dense_fraction), f"fire on > {latents.dense_frequency_bound:.0%}"),
            ("Tokens", f"{report.n_tokens:,}", f"{reconstruction.n_contexts:,} held-out contexts"),
        ],
        key=0,
    )
    remark = small_sample(report.n_tokens, reconstruction.n_contexts)
    return cards + (page.remark(remark) if remark else "")


def subtitle(report: Evaluation) -> str:
    """One line that says which SAE this is."""
    sae, (d_in, d_out) = report.sae, report.sae.widths
    k = f", k = {sae.k}" if sae.k is not None else ""
    model = report.provenance.model.get("id", "a model that the store does not record")
    to = "" if d_out == d_in else f" to {d_out:,} dimensions"
    return (
        f"{sae.config.get('activation', 'SAE')}{k}, {d_in:,} dimensions to {report.latents.d_latent:,} latents{to}"
        f" on {sae.hook} of {model}"
    )


def splice_sentence(report: Evaluation) -> str:
    """Which positions were replaced, and which predictions counted."""
    predictions = report.downstream.n_predictions if report.downstream is not None else 0
    kept = "BOS positions were replaced too" if report.settings.splice_bos else "BOS positions were left alone"
    return (
        f"The activation at {report.sae.site} was replaced at every position that the store marks as trainable;"
        f" {kept}. {predictions:,} next-token predictions count: labels that are BOS, padding"
        " or in another document do not."
    )


def metric_rows(metrics: Reconstruction | Downstream, rows: MetricRows) -> str:
    """A table of metrics with their intervals."""
    body = []
    for key, label, _ in rows:
        interval = metrics.confidence95.get(key)
        shown = f'<span class="interval">{interval[0]:.4g} to {interval[1]:.4g}</span>' if interval else ""
        body.append((text(label), number(getattr(metrics, key), 4), shown))
    return page.table(("", "value", "95 % interval"), body)


def site_rows(reconstruction: Reconstruction) -> str:
    """FVU and MSE of each written site, where there are several."""
    if reconstruction.sites is None:
        return ""
    rows = [(text(site), number(one.fvu, 4), number(one.mse, 4)) for site, one in reconstruction.sites.items()]
    return f'<div style="margin-top:12px">{page.table(("written site", "FVU", "MSE"), rows)}</div>'


def kind_rows(report: Evaluation) -> str:
    """FVU and norm of each kind of token, where the store has images."""
    if report.breakdown.kind is None:
        return ""
    rows = [
        (text(kind), f"{one.tokens:,}", number(one.fvu, 4), number(one.mean_norm, 4))
        for kind, one in report.breakdown.kind.items()
    ]
    return f'<div style="margin-top:12px">{page.table(("kind of token", "tokens", "FVU", "mean norm"), rows)}</div>'


def definitions() -> str:
    """What every metric means, in a line."""
    rows = [(text(label), text(meaning)) for _, label, meaning in (*DOWNSTREAM_ROWS, *RECONSTRUCTION_ROWS)]
    return page.folded("What the figures mean", page.table(("metric", "meaning"), rows, numeric_from=2))


def bos_sentence(reconstruction: Reconstruction) -> str:
    """How the BOS positions, which no other figure counts, would change the FVU."""
    bos = reconstruction.with_bos
    if bos is None:
        return ""
    return (
        '<div style="margin-top:12px">'
        + page.paragraph(
            f"Counting the {bos.n_bos:,} BOS positions as well, FVU would be {number(bos.fvu)}. On BOS alone"
            f" the reconstruction misses {percent(bos.bos_fvu_uncentred)} of the squared norm."
        )
        + "</div>"
    )


def differences(found: DiffFigures) -> str:
    """Whose the latents of a crosscoder are."""
    low, start, stop, high = found.cuts
    classes = (
        (f"{found.first} alone", found.only_first, found.specific_first, f"relative norm below {low:g}"),
        (f"{found.second} alone", found.only_second, found.specific_second, f"above {high:g}"),
        ("shared", found.shared, None, f"{start:g} to {stop:g}"),
        ("between", found.between, None, "the rest"),
    )
    rows = [
        (
            text(name),
            f"{count:,}",
            percent(count / max(found.alive, 1)),
            "-" if own is None else f"{own:,}",
            text(meaning),
        )
        for name, count, own, meaning in classes
    ]
    bins = [
        (text(f"{edge:.2f} to {found.edges[place + 1]:.2f}"), f"{count:,}")
        for place, (edge, count) in enumerate(zip(found.edges, found.latents, strict=False))
    ]
    return page.section(
        f"What {found.first} and {found.second} have in common",
        page.paragraph(
            f"Of {found.alive:,} latents that fired, by the norm of their decoder rows at the two sites. Specific by"
            f" latent scaling: the other site's share of the reconstruction is below {found.most_nu_reconstruction:g}"
            f" of the owner's, and of the error below {found.most_nu_error:g}. The rows of shared latents have a mean"
            f" cosine of {number(found.shared_cosine_mean)}."
        ),
        page.columns(
            page.table(("latents", "number", "share", "specific by scaling", "meaning"), rows),
            page.table(("relative norm", "latents"), bins),
        ),
    )


def densest_rows(densest: Sequence[DenseLatent]) -> str:
    """The latents that fire most."""
    rows = [(text(row.latent), percent(row.frequency), number(row.mean_activation)) for row in densest]
    head = ("most active latents", "fires on", "mean when it fires")
    return page.table(head, rows)


def activation_rows(activations: ActivationFigures) -> str:
    """What the store says of the activations: mean, spread and norms over the training tokens."""
    rows = [
        ("Mean norm", number(activations.mean_norm)),
        ("Median norm", number(activations.median_norm)),
        ("RMS norm", number(activations.rms_norm)),
        ("Largest norm", number(activations.max_norm)),
        ("Norm of the mean", number(activations.norm_of_mean)),
        ("Total variance", number(activations.total_variance)),
        ("Variance in the largest dimension", percent(activations.variance_in_largest)),
        ("FVU that the storage type cost", number(activations.relative_squared_error)),
        (
            f"Outlier dimensions (RMS {OUTLIER_RATIO:.0f} times the median's)",
            outlier_dimensions(activations.massive_dimensions),
        ),
    ]
    return page.table(("training tokens of the store", "value"), [(text(name), value) for name, value in rows])


def outlier_dimensions(dimensions: Sequence[MassiveDimension], shown: int = 4) -> str:
    """``4 (12 x), 7 (11 x)``."""
    named = ", ".join(f"{row.dimension} ({row.rms_ratio:.0f} x)" for row in dimensions[:shown])
    more = f" and {len(dimensions) - shown} more" if len(dimensions) > shown else ""
    return text(f"{named}{more}" or "none")


def provenance(report: Evaluation) -> str:
    """Corpus, store, checkpoint, evaluation, each with its hash."""
    source = report.provenance
    links = [
        ("Corpus", source.corpus.get("description") or "", short(source.corpus.get("fingerprint"))),
        (
            "Activation store",
            f"{source.model.get('id', '')} {report.sae.hook}",
            short(source.store.digest),
        ),
        ("SAE", report.sae.name, short(source.sae.sha256)),
        ("This evaluation", f"{report.n_tokens:,} held-out tokens", f"definitions {report.definitions}"),
    ]
    return page.chain(links)


def footer(report: Evaluation) -> str:
    """When and with what it was made."""
    versions = report.environment.versions
    return f"Made {report.created} by Granary {versions['granary']}. Formulas: docs/metrics.md."


def pick(plots: dict[str, Plot], *names: str) -> list[Plot]:
    """The named plots that this evaluation has."""
    return [plots[name] for name in names if name in plots]


def spread(metrics: Reconstruction | Downstream, key: str) -> str:
    """``± 0.004``, half the 95 % interval."""
    interval = metrics.confidence95.get(key)
    return f"± {(interval[1] - interval[0]) / 2:.2g} (95 %)" if interval else ""
