"""The supervised scores on the pages of one evaluation and of a comparison."""

from collections.abc import Iterable, Mapping, Sequence

from stage_eval.results.comparison import ComparisonRow
from stage_eval.results.supervised import (
    ConceptFigures,
    Ranged,
    Removal,
    SupervisedFigures,
    SupervisedOutline,
    headline_place,
)
from stage_eval.show import page
from stage_eval.show.page import text
from stage_eval.show.plots import numbered
from stage_eval.show.supervised_plots import supervised_plots
from stage_eval.show.sweep_plots import label_plots
from stage_eval.show.text import number

SUPERVISED_HEADINGS = ("1 latent", "5 latents", "split", "absorbed", "TPP", "SCR")
MEANING = (
    ("1 latent, 5 latents", "balanced accuracy of a probe that sees the latents of the largest difference of means"),
    ("5 coordinates", "the same with coordinates of the activation: a control"),
    ("activation", "a probe on the whole activation: what there is to be found"),
    ("token", "what the token alone says, without any activation: a control"),
    ("split", "latents that a concept is spread over: each adds more than 0.03 to F1; interval on the choosing half"),
    ("absorbed", "share of a concept's projection that latents other than its own took over; lower is better"),
    (
        "TPP",
        "targeted probe perturbation: what probes lose by ablating latents of their kind, less what others lose",
    ),
    (
        "SCR",
        "spurious correlation removal: share of what a biased probe lacks that ablation gives back",
    ),
)


def supervised_section(figures: SupervisedFigures) -> str:
    """The section of a report."""
    outline = SupervisedOutline.of(figures)
    fitted, scored = figures.documents
    lead = (
        f"Against labels that Python's own tokenizer gives. Probes and latents were chosen on {fitted:,} documents; all"
        f" figures are of {scored:,} others, their 95 % intervals over documents. Balanced accuracy of chance is 0.5."
    )
    return page.section(
        "Labels of Python",
        page.paragraph(lead),
        "" if outline is None else page.cards(_cards(outline)),
        f'<div style="margin-top:16px">{page.figures(supervised_plots(figures))}</div>',
        *([_spaced(_concept_table(figures.concepts))] if figures.concepts else []),
        *([] if figures.removal is None else [_spaced(_pair_table(figures.removal))]),
        *([page.remark(f"Not scored: {_left_out(figures.left_out)}.")] if figures.left_out else []),
        page.folded(
            "What these figures mean",
            page.table(("figure", "meaning"), [(text(one), text(meaning)) for one, meaning in MEANING], numeric_from=2),
        ),
    )


def supervised_comparison(
    rows: Sequence[ComparisonRow], labels: Mapping[str, str], of_site: str, index: int
) -> list[str]:
    """The section of the comparison's page for one site; none where no SAE has supervised scores."""
    if all(row.supervised is None for row in rows):
        return []
    body = [(text(labels[row.name]), *map(_cell, headline_figures(row.supervised))) for row in rows]
    return [
        page.section(
            f"Labels of Python{of_site}",
            page.paragraph(whole_activation(row.supervised for row in rows)),
            page.figures(numbered(label_plots(rows), index)),
            _spaced(page.table(("SAE", *SUPERVISED_HEADINGS), body)),
        )
    ]


def whole_activation(outlines: Iterable[SupervisedOutline | None]) -> str:
    """What there is to be found by latents: the same for all dictionaries that read one site."""
    found = next((one.activation for one in outlines if one is not None), None)
    return f"A probe on the whole activation tells the concepts with {number(None if found is None else found.value)}."


def headline_figures(outline: SupervisedOutline | None) -> list[Ranged | None]:
    """The figures under `SUPERVISED_HEADINGS`."""
    if outline is None:
        return [None] * len(SUPERVISED_HEADINGS)
    absorbed, perturbed, removed = outline.absorbed_fraction, outline.perturbation, outline.removal
    return [outline.latents_1, outline.latents_5, outline.split, absorbed, perturbed, removed]


def _cards(outline: SupervisedOutline) -> list[tuple[str, str, str]]:
    """Headlines, each with its interval."""
    shown: list[tuple[str, Ranged | None]] = [
        ("One latent", outline.latents_1),
        ("Five latents", outline.latents_5),
        ("Whole activation", outline.activation),
        ("Latents per concept", outline.split),
        ("Absorbed", outline.absorbed_fraction),
        ("Absorbed in full", outline.absorbed),
        (f"TPP, {outline.ablated} latents", outline.perturbation),
        (f"SCR, {outline.ablated} latents", outline.removal),
    ]
    return [(label, number(one.value), _interval(one)) for label, one in shown if one is not None]


def _interval(one: Ranged) -> str:
    return f"{one.interval[0]:.3g} to {one.interval[1]:.3g}" if one.interval else ""


def _cell(one: Ranged | None, digits: int = 3) -> str:
    """A figure with its interval below."""
    if one is None:
        return "-"
    return f'{number(one.value, digits)}<br><span class="interval">{text(_interval(one))}</span>'


def _concept_table(concepts: Sequence[ConceptFigures]) -> str:
    """A line per concept."""
    head = (
        "concept",
        "best latent",
        "1 latent",
        "5 latents",
        "5 coordinates",
        "activation",
        "token",
        "split",
        "absorbed",
    )
    body = [
        (
            f'{text(one.concept)}<br><span class="interval">{one.examples[1]:,} in {one.documents:,} documents</span>',
            text(one.best[0]),
            _cell(one.probes.latents["1"]),
            _cell(one.probes.latents["5"]),
            _cell(one.probes.coordinates["5"]),
            _cell(one.probes.activation),
            _cell(one.probes.token),
            _cell(one.split, digits=0),
            _cell(one.absorption.fraction if one.absorption is not None else None),
        )
        for one in concepts
    ]
    return page.table(head, body)


def _pair_table(found: Removal) -> str:
    """A line per pair of labels; the curves have the other numbers of latents."""
    place = headline_place(found.ablated)
    count = found.ablated[place]
    head = ("target, spurious", "clean probe", "biased probe", f"SCR, {count} latents", f"{count} at random")
    body = [
        (
            text(f"{one.target}, {one.spurious}"),
            *map(_cell, (one.clean, one.biased, one.score[place], one.random[place])),
        )
        for one in found.pairs
    ]
    return page.table(head, body)


def _left_out(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({why})" for name, why in left_out.items())


def _spaced(content: str) -> str:
    return f'<div style="margin-top:16px">{content}</div>'
