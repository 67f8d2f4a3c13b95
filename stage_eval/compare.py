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


def compare(
    reports: Sequence[dict[str, Any]], links: Sequence[str | None], joint: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The comparison as comparison.json holds it; `links` are the reports' addresses relative to the page.

    `joint`: the losses with all SAEs spliced at once, where that was asked for.
    """
    rows = [comparison_row(report, link) for report, link in zip(reports, links, strict=True)]
    rows.sort(key=lambda row: (row["hook"], row["expansion"], row["k"] or 0, row["l0"], row["name"]))
    return {
        "format": FORMAT,
        "definitions": reports[0]["definitions"],
        "created": reports[0]["created"],
        "store": reports[0]["provenance"]["store"],
        "model": reports[0]["provenance"]["model"],
        "rows": rows,
        "joint": joint,
    }


def comparison_row(report: dict[str, Any], link: str | None) -> dict[str, Any]:
    """What a comparison keeps of one evaluation."""
    config = report["sae"]["config"]
    losses = ("loss_recovered", "kl") if report["downstream"] is not None else ()
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
            **{name: report["downstream"]["confidence95"][name] for name in losses},
        },
    }


def render_comparison(comparison: dict[str, Any]) -> str:
    """The page of a sweep."""
    rows = comparison["rows"]
    least = min(rows, key=lambda row: row["fvu"])
    hooks = sorted({row["hook"] for row in rows})
    where = f"{', '.join(hooks)} of {comparison['model'].get('id', 'a model that the store does not record')}"
    lead = f"{len(rows)} SAEs on {where}, {rows[0]['n_tokens']:,} held-out tokens"
    cards = [("Least FVU", number(least["fvu"]), least["name"])]
    if has_losses(rows):
        best = max(rows, key=lambda row: row["loss_recovered"])
        cards = [
            ("Most loss recovered", number(best["loss_recovered"]), best["name"]),
            *cards,
            ("Clean loss", number(rows[0]["ce_clean"]), "nats per token"),
            ("Zero-ablated loss", number(rows[0]["ce_zero"]), f"mean-ablated {number(rows[0]['ce_mean'])}"),
        ]
    sections = [page.cards(cards, key=0)]
    if comparison["joint"] is not None:
        sections.append(page.section("All hooks at once", joint_table(comparison["joint"])))
    sections += [
        page.section("Quality against sparsity", page.figures(sweep_plots(rows))),
        page.section("All SAEs", comparison_table(rows)),
    ]
    footer = f"Made {comparison['created']}. Store {short(comparison['store']['digest'])}. Formulas: docs/metrics.md."
    return page.page("Sweep comparison", "SAE comparison", lead, sections, footer)


def has_losses(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the language model was run for every row."""
    return all(row["ce_spliced"] is not None for row in rows)


def joint_table(joint: dict[str, Any]) -> str:
    """The losses with every hook replaced at the same time."""
    keys = ("ce_clean", "ce_spliced", "ce_mean", "ce_zero", "loss_recovered", "kl")
    head = ("spliced together", "CE clean", "CE spliced", "CE mean-ablated", "CE zero-ablated", "loss recovered", "KL")
    return page.table(head, [(text(", ".join(joint["hooks"])), *(number(joint[key], 4) for key in keys))])


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per SAE; the best value of a column stands out."""
    best = {"fvu": min(row["fvu"] for row in rows)}
    if has_losses(rows):
        best |= {name: min(row[name] for row in rows) for name in ("kl", "ce_spliced")}
        best["loss_recovered"] = max(row["loss_recovered"] for row in rows)

    def value(row: dict[str, Any], key: str, digits: int = 4) -> str:
        shown = number(row[key], digits)
        return f'<span class="best">{shown}</span>' if len(rows) > 1 and row[key] == best.get(key) else shown

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
