"""The report of one evaluation: a self-contained HTML page made from what eval.json holds."""

import math
from typing import Any

from shared.store.statistics import OUTLIER_RATIO
from stage_eval.show import page
from stage_eval.show.page import text
from stage_eval.show.plots import activation_plots, evaluation_plots
from stage_eval.show.theme import Plot

Report = dict[str, Any]

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


def render(report: Report) -> str:
    """The page, from an evaluation as eval.json holds it."""
    sae, downstream, reconstruction = report["sae"], report["downstream"], report["reconstruction"]
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
        ),
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
                densest_rows(report["latents"]),
                *map(page.figure, pick(plots, "training")),
            ),
        ),
        page.section(
            "The activations themselves",
            page.columns(
                *map(page.figure, activation_plots(report["activations"])),
                activation_rows(report["activations"]),
            ),
        ),
        page.section("Where it comes from", provenance(report)),
        page.section(
            "Details",
            definitions(),
            page.folded_json("SAE configuration", sae["config"]),
            page.folded_json("Evaluation settings", report["settings"]),
            page.folded_json("Provenance in full", report["provenance"]),
            page.folded_json("Software and machine", report["environment"]),
        ),
    ]
    return page.page(f"{sae['name']}", "SAE evaluation", subtitle(report), sections, footer(report))


def headline(report: Report) -> str:
    """The cards at the top."""
    reconstruction, latents, downstream = report["reconstruction"], report["latents"], report["downstream"]
    fvu = ("FVU", number(report["fvu"]), spread(reconstruction, "fvu"))
    sparsity = ("L0", number(report["l0"], 4), f"of {latents['d_latent']:,} latents")
    if downstream is None:
        quality = [fvu, ("Cosine", number(reconstruction["cosine"]), spread(reconstruction, "cosine")), sparsity]
    else:
        quality = [
            ("Loss recovered", number(report["loss_recovered"]), spread(downstream, "loss_recovered")),
            fvu,
            sparsity,
            ("Added loss", f"{downstream['ce_increase']:+.3f}", f"{report['ce_clean']:.3f} clean, nats per token"),
            ("KL to clean", number(report["kl"]), "nats per token"),
        ]
    return page.cards(
        [
            *quality,
            ("Dead latents", percent(report["dead_fraction"]), f"{latents['dead']:,} never fired"),
            ("Dense latents", percent(latents["dense_fraction"]), f"fire on > {latents['dense_frequency_bound']:.0%}"),
            ("Tokens", f"{report['n_tokens']:,}", f"{reconstruction['n_contexts']:,} held-out contexts"),
        ],
        key=0,
    )


def subtitle(report: Report) -> str:
    """One line that says which SAE this is."""
    config, sae = report["sae"]["config"], report["sae"]
    k = f", k = {config['k']}" if config.get("k") is not None else ""
    model = report["provenance"]["model"].get("id", "a model that the store does not record")
    return (
        f"{config.get('activation', 'SAE')}{k}, {config['d_model']:,} dimensions to {config['d_latent']:,} latents"
        f" on {sae['hook']} of {model}"
    )


def splice_sentence(report: Report) -> str:
    """Which positions were replaced, and which predictions counted."""
    kept = "BOS positions were replaced too" if report["settings"]["splice_bos"] else "BOS positions were left alone"
    return (
        f"The activation at {report['sae']['hook']} was replaced at every position that the store marks as trainable;"
        f" {kept}. {report['downstream']['n_predictions']:,} next-token predictions count: labels that are BOS, padding"
        " or in another document do not."
    )


def metric_rows(metrics: Report, rows: tuple[tuple[str, str, str], ...]) -> str:
    """A table of metrics with their intervals."""
    body = []
    for key, label, _ in rows:
        interval = metrics["confidence95"].get(key)
        shown = f'<span class="interval">{interval[0]:.4g} to {interval[1]:.4g}</span>' if interval else ""
        body.append((text(label), number(metrics[key], 4), shown))
    return page.table(("", "value", "95 % interval"), body)


def definitions() -> str:
    """What every metric means, in a line."""
    rows = [(text(label), text(meaning)) for _, label, meaning in (*DOWNSTREAM_ROWS, *RECONSTRUCTION_ROWS)]
    return page.folded("What the figures mean", page.table(("metric", "meaning"), rows, numeric_from=2))


def bos_sentence(reconstruction: Report) -> str:
    """How the BOS positions, which no other figure counts, would change the FVU."""
    bos = reconstruction["with_bos"]
    if bos is None:
        return ""
    return (
        '<div style="margin-top:12px">'
        + page.paragraph(
            f"Counting the {bos['n_bos']:,} BOS positions as well, FVU would be {number(bos['fvu'])}. On BOS alone"
            f" the reconstruction misses {percent(bos['bos_fvu_uncentred'])} of the squared norm."
        )
        + "</div>"
    )


def densest_rows(latents: Report) -> str:
    """The latents that fire most."""
    rows = [
        (text(row["latent"]), percent(row["frequency"]), number(row["mean_activation"])) for row in latents["densest"]
    ]
    head = ("most active latents", "fires on", "mean when it fires")
    return page.table(head, rows)


def activation_rows(activations: Report) -> str:
    """What the store says of the activations: mean, spread and norms over the training tokens."""
    rows = [
        ("Mean norm", number(activations["mean_norm"])),
        ("Median norm", number(activations["median_norm"])),
        ("RMS norm", number(activations["rms_norm"])),
        ("Largest norm", number(activations["max_norm"])),
        ("Norm of the mean", number(activations["norm_of_mean"])),
        ("Total variance", number(activations["total_variance"])),
        ("Variance in the largest dimension", percent(activations["variance_in_largest"])),
        ("FVU that the storage type cost", number(activations["relative_squared_error"])),
        (
            f"Outlier dimensions (RMS {OUTLIER_RATIO:.0f} times the median's)",
            outlier_dimensions(activations["massive_dimensions"]),
        ),
    ]
    return page.table(("training tokens of the store", "value"), [(text(name), value) for name, value in rows])


def outlier_dimensions(dimensions: list[Report], shown: int = 4) -> str:
    """``4 (12 x), 7 (11 x)``."""
    named = ", ".join(f"{row['dimension']} ({row['rms_ratio']:.0f} x)" for row in dimensions[:shown])
    more = f" and {len(dimensions) - shown} more" if len(dimensions) > shown else ""
    return text(f"{named}{more}" or "none")


def provenance(report: Report) -> str:
    """Corpus, store, checkpoint, evaluation, each with its hash."""
    source = report["provenance"]
    links = [
        ("Corpus", source["corpus"].get("description") or "", short(source["corpus"].get("fingerprint"))),
        (
            "Activation store",
            f"{source['model'].get('id', '')} {report['sae']['hook']}",
            short(source["store"]["digest"]),
        ),
        ("SAE checkpoint", report["sae"]["name"], short(source["sae"]["sha256"])),
        ("This evaluation", f"{report['n_tokens']:,} held-out tokens", f"definitions {report['definitions']}"),
    ]
    return page.chain(links)


def footer(report: Report) -> str:
    """When and with what it was made."""
    versions = report["environment"]["versions"]
    return f"Made {report['created']} by Granary {versions['granary']}. Formulas: docs/metrics.md."


def pick(plots: dict[str, Plot], *names: str) -> list[Plot]:
    """The named plots that this evaluation has."""
    return [plots[name] for name in names if name in plots]


def spread(metrics: Report, key: str) -> str:
    """``± 0.004``, half the 95 % interval."""
    interval = metrics["confidence95"].get(key)
    return f"± {(interval[1] - interval[0]) / 2:.2g} (95 %)" if interval else ""


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits for small numbers, significant ones for the rest, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:,.{max(digits - 2, 1)}f}"


def percent(value: float | None) -> str:
    """``1.2 %``."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.3g} %"


def short(digest: str | None) -> str:
    """The first 16 characters of a hash."""
    return (digest or "not recorded").removeprefix("sha256:")[:16]
