"""Several evaluations side by side: comparison.json, a page with Pareto fronts, a table."""

from collections.abc import Sequence
from typing import Any

from stage_eval import page
from stage_eval.page import text
from stage_eval.report import number, percent, short
from stage_eval.sweep_plots import sweep_plots

FORMAT = "granary-comparison"
METRICS = (
    "fvu",
    "l0",
    "dead_fraction",
    "ce_clean",
    "ce_spliced",
    "ce_zero",
    "ce_mean",
    "loss_recovered",
    "kl",
    "n_tokens",
)


def compare(reports: Sequence[dict[str, Any]], links: Sequence[str | None]) -> dict[str, Any]:
    """The comparison as comparison.json holds it; `links` are the reports' addresses relative to the page."""
    rows = [comparison_row(report, link) for report, link in zip(reports, links, strict=True)]
    rows.sort(key=lambda row: (row["hook"], row["expansion"], row["k"] or 0, row["l0"], row["name"]))
    return {
        "format": FORMAT,
        "definitions": reports[0]["definitions"],
        "created": reports[0]["created"],
        "store": reports[0]["provenance"]["store"],
        "model": reports[0]["provenance"]["model"],
        "rows": rows,
    }


def comparison_row(report: dict[str, Any], link: str | None) -> dict[str, Any]:
    """What a comparison keeps of one evaluation."""
    config = report["sae"]["config"]
    return {
        "name": report["sae"]["name"],
        "path": report["sae"]["path"],
        "report": link,
        "hook": report["sae"]["hook"],
        "activation": config.get("activation"),
        "k": config.get("k"),
        "expansion": config["d_latent"] / config["d_model"],
        "d_latent": config["d_latent"],
        **{name: report[name] for name in METRICS},
        "cosine": report["reconstruction"]["cosine"],
        "fvu_per_dimension_mean": report["reconstruction"]["fvu_per_dimension_mean"],
        "dense_fraction": report["latents"]["dense_fraction"],
        "confidence95": {
            "fvu": report["reconstruction"]["confidence95"]["fvu"],
            "loss_recovered": report["downstream"]["confidence95"]["loss_recovered"],
            "kl": report["downstream"]["confidence95"]["kl"],
        },
    }


def render_comparison(comparison: dict[str, Any]) -> str:
    """The page of a sweep."""
    rows = comparison["rows"]
    best = max(rows, key=lambda row: row["loss_recovered"])
    least = min(rows, key=lambda row: row["fvu"])
    hooks = sorted({row["hook"] for row in rows})
    where = f"{', '.join(hooks)} of {comparison['model']['id']}"
    lead = f"{len(rows)} SAEs on {where}, {rows[0]['n_tokens']:,} held-out tokens"
    sections = [
        page.cards(
            [
                ("Most loss recovered", number(best["loss_recovered"]), best["name"]),
                ("Least FVU", number(least["fvu"]), least["name"]),
                ("Clean loss", number(rows[0]["ce_clean"]), "nats per token"),
                ("Zero-ablated loss", number(rows[0]["ce_zero"]), f"mean-ablated {number(rows[0]['ce_mean'])}"),
            ],
            key=0,
        ),
        page.section("Quality against sparsity", page.figures(sweep_plots(rows))),
        page.section("All SAEs", comparison_table(rows)),
    ]
    footer = f"Made {comparison['created']}. Store {short(comparison['store']['digest'])}. Formulas: docs/metrics.md."
    return page.page("Sweep comparison", "SAE comparison", lead, sections, footer)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per SAE; the best value of a column stands out."""
    best = {
        "fvu": min(row["fvu"] for row in rows),
        "kl": min(row["kl"] for row in rows),
        "ce_spliced": min(row["ce_spliced"] for row in rows),
        "loss_recovered": max(row["loss_recovered"] for row in rows),
    }

    def value(row: dict[str, Any], key: str, digits: int = 4) -> str:
        shown = number(row[key], digits)
        return f'<span class="best">{shown}</span>' if len(rows) > 1 and row[key] == best[key] else shown

    body = [
        (
            f'<a href="{text(row["report"])}">{text(row["name"])}</a>' if row["report"] else text(row["name"]),
            text("-" if row["k"] is None else row["k"]),
            f"{row['expansion']:g}",
            number(row["l0"]),
            value(row, "fvu"),
            value(row, "loss_recovered"),
            value(row, "ce_spliced"),
            value(row, "kl"),
            percent(row["dead_fraction"]),
            percent(row["dense_fraction"]),
        )
        for row in rows
    ]
    head = ("SAE", "k", "expansion", "L0", "FVU", "loss recovered", "CE spliced", "KL", "dead", "dense")
    return page.table(head, body)
