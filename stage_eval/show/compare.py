"""Several evaluations side by side: comparison.json, a page with Pareto fronts, a table."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stage_eval.show import page
from stage_eval.show.page import text
from stage_eval.show.plots import activation_plots
from stage_eval.show.report import activation_rows, number, percent, short
from stage_eval.show.sweep_plots import latent_plots, sweep_plots

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
        "corpus": reports[0]["provenance"]["corpus"],
        "settings": reports[0]["settings"],
        "activations": {report["sae"]["hook"]: report["activations"] for report in reports},
        "configs": common_and_different([report["sae"]["config"] for report in reports]),
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
        "activation": "matryoshka" if config.get("prefixes") else config.get("activation"),
        "k": config.get("k"),
        "expansion": config["d_latent"] / config["d_model"],
        "d_latent": config["d_latent"],
        **{name: report[name] for name in METRICS},
        "cosine": report["reconstruction"]["cosine"],
        "fvu_per_dimension_mean": report["reconstruction"]["fvu_per_dimension_mean"],
        "dense_fraction": report["latents"]["dense_fraction"],
        "duplicates": report["decoder"]["duplicates"],
        "sha256": report["provenance"]["sae"]["sha256"],
        "frequency": {name: report["latents"]["histogram"][name] for name in ("log10_edges", "latents")},
        "nearest": {name: report["decoder"][name] for name in ("edges", "nearest")},
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
        page.section("Latents", page.figures(latent_plots(rows))),
        *(
            page.section(
                f"The activations of {hook}",
                # Names, hence identifiers on the page, of their own for each hook.
                page.columns(
                    *(page.figure(replace(plot, name=f"{plot.name}-{index}")) for plot in activation_plots(described)),
                    activation_rows(described),
                ),
            )
            for index, (hook, described) in enumerate(comparison["activations"].items())
        ),
        page.section("Where it comes from", provenance(comparison)),
        page.section(
            "Details",
            page.folded_json("Configuration that all share", comparison["configs"]["common"]),
            page.folded_json("Evaluation settings", comparison["settings"]),
            page.folded("Checkpoint hashes", hash_table(rows)),
        ),
    ]
    footer = f"Made {comparison['created']}. Store {short(comparison['store']['digest'])}. Formulas: docs/metrics.md."
    return page.page("Sweep comparison", "SAE comparison", lead, sections, footer)


def common_and_different(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all SAEs share, and the names of those that differ."""
    common = {key: value for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}
    return {"common": common, "different": sorted({key for config in configs for key in config} - set(common))}


def provenance(comparison: dict[str, Any]) -> str:
    """Corpus, store, checkpoints, this comparison."""
    rows, corpus = comparison["rows"], comparison["corpus"]
    model = comparison["model"].get("id", "a model that the store does not record")
    different = ", ".join(comparison["configs"]["different"]) or "nothing but the weights"
    links = [
        ("Corpus", corpus.get("description") or "", short(corpus.get("fingerprint"))),
        ("Activation store", model, short(comparison["store"]["digest"])),
        (f"{len(rows)} SAE checkpoints", f"they differ in {different}", "hashes below"),
        ("This comparison", f"{rows[0]['n_tokens']:,} held-out tokens", f"definitions {comparison['definitions']}"),
    ]
    return page.chain(links)


def hash_table(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of every checkpoint's weights."""
    body = [(text(row["name"]), f'<span class="hash">{text(row["sha256"])}</span>') for row in rows]
    return page.table(("SAE", "SHA-256 of its weights"), body, numeric_from=2)


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
            percent(row["duplicates"]),
        )
        for row in rows
    ]
    head = ("SAE", "k", "expansion", "L0", "FVU", "recovered", "CE spliced", "KL", "dead", "dense", "repeated")
    return page.table(head, body)
