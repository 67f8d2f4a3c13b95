"""The page of a comparison: Pareto fronts and a table for each site, what the activations are like, and provenance."""

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import unquote

from shared.basics.pages_link import slot
from stage_eval.results.comparison import Comparison, ComparisonRow, LeftOut, least_fvu
from stage_eval.results.figures import JointDownstream
from stage_eval.show import page
from stage_eval.show.page import text
from stage_eval.show.plots import activation_plots, numbered
from stage_eval.show.report import activation_rows
from stage_eval.show.supervised import supervised_comparison
from stage_eval.show.sweep_plots import has_losses, latent_plots, sweep_plots
from stage_eval.show.text import differing, middle_cut, number, percent, short, small_sample

JOINT_COLUMNS = (
    ("ce_clean", "CE clean"),
    ("ce_spliced", "CE spliced"),
    ("ce_mean", "CE mean-ablated"),
    ("ce_zero", "CE zero-ablated"),
    ("loss_recovered", "loss recovered"),
    ("kl", "KL"),
)


def render_comparison(comparison: Comparison) -> str:
    """The page of a sweep. SAEs of different sites are shown apart: their errors and losses can't be ranked."""
    rows, sites = comparison.rows, comparison.by_site
    where = f"{', '.join(sites)} of {comparison.model.get('id', 'a model that the store does not record')}"
    lead = f"{len(rows)} SAEs on {where}, {rows[0].n_tokens:,} held-out tokens"
    warnings = [small_sample(rows[0].n_tokens, rows[0].n_contexts), *map(left_out_sentence, comparison.left_out)]
    sections = ["".join(page.remark(warning) for warning in warnings if warning)]
    if comparison.joint is not None:
        sections.append(page.section("All hooks at once", joint_table(comparison.joint)))
    for index, (site, group) in enumerate(sites.items()):
        of_site = f" at {site}" if len(sites) > 1 else ""
        sections += [
            page.section(f"Best{of_site}", headline(group)) if of_site else headline(group),
            page.section(f"Quality against sparsity{of_site}", page.figures(numbered(sweep_plots(group), index))),
            page.section(f"All SAEs{of_site}", comparison_table(group)),
            *supervised_comparison(group, labels(group), of_site, index),
            page.section(f"Latents{of_site}", page.figures(numbered(latent_plots(group), index))),
        ]
    sections += [
        *(
            page.section(
                f"The activations of {site}",
                # Names, hence identifiers on the page, of their own for each site.
                page.columns(
                    *(page.figure(replace(plot, name=f"{plot.name}-{index}")) for plot in activation_plots(described)),
                    activation_rows(described),
                ),
            )
            for index, (site, described) in enumerate(comparison.activations.items())
        ),
        page.section("Where it comes from", provenance(comparison)),
        page.section(
            "Details",
            page.folded_json("Configuration that all share", comparison.configs.common),
            page.folded_json("Evaluation settings", comparison.settings.to_json()),
            page.folded("Full names and hashes", hash_table(rows)),
        ),
    ]
    footer = f"Made {comparison.created}. Store {short(comparison.store.digest)}. Formulas: docs/metrics.md."
    return page.page("Sweep comparison", "SAE comparison", lead, sections, footer)


def labels(rows: Sequence[ComparisonRow]) -> dict[str, str]:
    """What tiles and tables call the SAEs of one site, by their full names: what differs among them."""
    names = [row.name for row in rows]
    return dict(zip(names, map(middle_cut, differing(names)), strict=True))


def headline(rows: Sequence[ComparisonRow]) -> str:
    """The cards of one site: its best SAE, and what the model loses without any."""
    shown, least = labels(rows), least_fvu(rows)
    cards = [("Least FVU", number(least.fvu), shown[least.name])]
    if has_losses(rows):
        best = max(rows, key=lambda row: row.loss_recovered or 0.0)
        cards = [
            ("Most loss recovered", number(best.loss_recovered), shown[best.name]),
            *cards,
            ("Clean loss", number(rows[0].ce_clean), "nats per token"),
            ("Zero-ablated loss", number(rows[0].ce_zero), f"mean-ablated {number(rows[0].ce_mean)}"),
        ]
    return page.cards(cards, key=0)


def left_out_sentence(left: LeftOut) -> str:
    """Which folder is missing from the comparison, and why."""
    return f"Left out: {left.reason}"


def provenance(comparison: Comparison) -> str:
    """Corpus, store, SAEs, this comparison."""
    rows, corpus = comparison.rows, comparison.corpus
    model = comparison.model.get("id", "a model that the store does not record")
    different = ", ".join(comparison.configs.different) or "nothing but the weights"
    links = [
        ("Corpus", corpus.get("description") or "", short(corpus.get("fingerprint"))),
        ("Activation store", model, short(comparison.store.digest)),
        (f"{len(rows)} SAEs", f"they differ in {different}", "hashes below"),
        ("This comparison", f"{rows[0].n_tokens:,} held-out tokens", f"definitions {comparison.definitions}"),
    ]
    return page.chain(links)


def hash_table(rows: Sequence[ComparisonRow]) -> str:
    """Full name and SHA-256 of the weights of every SAE."""
    body = [(text(row.name), f'<span class="hash">{text(row.sha256)}</span>') for row in rows]
    return page.table(("SAE", "SHA-256 of its weights"), body, numeric_from=2)


def name_cell(row: ComparisonRow, shown: str) -> str:
    """An SAE's name, which leads to its report, and a slot for a link to the pages of its latents."""
    if not row.report:
        return text(shown)
    run = posixpath.dirname(unquote(row.report)) or "."
    return f'<a href="{text(row.report)}">{text(shown)}</a> {slot(run)}'


def joint_table(joint: JointDownstream) -> str:
    """The losses with every hook replaced at the same time."""
    head = ("spliced together", *(heading for _, heading in JOINT_COLUMNS))
    figures = (number(getattr(joint, name), 4) for name, _ in JOINT_COLUMNS)
    return page.table(head, [(text(", ".join(joint.hooks)), *figures)])


def comparison_table(rows: Sequence[ComparisonRow]) -> str:
    """One line per SAE of a site; the best value of a column stands out."""
    shown = labels(rows)

    def marked(row: ComparisonRow, name: str, *, largest: bool = False) -> str:
        figures = [value for one in rows if (value := getattr(one, name)) is not None]
        value = getattr(row, name)
        figure = number(value, 4)
        is_best = len(rows) > 1 and figures and value == (max(figures) if largest else min(figures))
        return f'<span class="best">{figure}</span>' if is_best else figure

    body = [
        (
            name_cell(row, shown[row.name]),
            text("-" if row.k is None else row.k),
            f"{row.expansion:g}",
            number(row.l0),
            marked(row, "fvu"),
            marked(row, "loss_recovered", largest=True),
            marked(row, "ce_spliced"),
            marked(row, "kl"),
            percent(row.dead_fraction),
            percent(row.dense_fraction),
            percent(row.duplicates),
        )
        for row in rows
    ]
    head = ("SAE", "k", "expansion", "L0", "FVU", "recovered", "CE spliced", "KL", "dead", "dense", "repeated")
    return page.table(head, body)
