"""Figures of the supervised scores of one evaluation."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stage_eval.results.supervised import ConceptFigures, Perturbation, Ranged, Removal, SupervisedFigures
from stage_eval.show.theme import MARKERS, Palette, Plot

ROW = 0.23
"""Inches that a concept takes."""


def supervised_plots(figures: SupervisedFigures) -> list[Plot]:
    """Those that there is something to draw of."""
    plots = []
    if figures.concepts:
        plots += [probing(figures.concepts), absorption(figures.concepts)]
    if figures.perturbation is not None:
        plots.append(perturbation(figures.perturbation))
    if figures.removal is not None:
        plots.append(removal(figures.removal))
    return plots


def probing(concepts: Sequence[ConceptFigures]) -> Plot:
    """Accuracy by concept: one latent, five, and the controls."""
    ordered = sorted(concepts, key=lambda one: one.probes.latents["1"].value or 0.0)

    def draw(axes: Axes, palette: Palette) -> None:
        columns = (
            ("token alone", palette.muted, "|", [one.probes.token for one in ordered], 0.0),
            ("whole activation", palette.series2, "D", [one.probes.activation for one in ordered], 0.0),
            ("5 latents", palette.series6, "s", [one.probes.latents["5"] for one in ordered], -0.12),
            ("1 latent", palette.series1, "o", [one.probes.latents["1"] for one in ordered], 0.12),
        )
        for label, colour, marker, found, shift in columns:
            rows = [row + shift for row in range(len(ordered))]
            axes.plot([_number(one) for one in found], rows, marker, color=colour, label=label, markersize=4)
            if "latent" in label:
                _bars(axes, found, rows, colour)
        axes.axvline(0.5, color=palette.muted, linewidth=0.8, linestyle=(0, (3, 3)))
        _by_concept(axes, ordered)
        axes.set_xlabel("balanced accuracy on other documents")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return Plot(
        "labels_probing",
        "Sparse probing",
        "How well a probe tells each concept's tokens that sees one latent, five, the whole activation, or the token"
        " alone. Lines are 95 % intervals over documents; chance is 0.5.",
        draw,
        height=1.2 + ROW * len(ordered),
    )


def absorption(concepts: Sequence[ConceptFigures]) -> Plot:
    """Absorbed fraction by concept, beside the number of latents that it is split into."""
    ordered = sorted(concepts, key=lambda one: one.probes.latents["1"].value or 0.0)

    def draw(axes: Axes, palette: Palette) -> None:
        rows = list(range(len(ordered)))
        found = [None if one.absorption is None else one.absorption.fraction for one in ordered]
        axes.barh(rows, [0.0 if one is None else one.value or 0.0 for one in found], color=palette.series5, height=0.6)
        _bars(axes, found, rows, palette.text)
        for row, one in enumerate(ordered):
            axes.annotate(f"{_number(one.split):.0f}", (1.02, row), va="center", fontsize=7.5, annotation_clip=False)
        axes.set_xlim(0, 1)
        _by_concept(axes, ordered)
        axes.set_xlabel("share of the projection that other latents took over")

    return Plot(
        "labels_absorption",
        "Absorption and splitting",
        "Bars: of the tokens that a probe on the whole activation finds, the mean share that latents other than the"
        " concept's own make up; lower is better. No bar where the concept's own latents find too little of it. Numbers"
        " at the right: latents that the concept is split into.",
        draw,
        height=1.2 + ROW * len(ordered),
    )


def perturbation(found: Perturbation) -> Plot:
    """What probes lose by the number of ablated latents."""

    def draw(axes: Axes, palette: Palette) -> None:
        _curve(axes, found.ablated, found.score, palette.series1, MARKERS[0], "latents of the kind")
        _curve(axes, found.ablated, found.random, palette.muted, MARKERS[1], "random latents")
        _ablated(axes, found.ablated)
        axes.set_ylabel("own loss less the others'")

    return Plot(
        "labels_perturbation",
        "Targeted probe perturbation",
        f"Balanced accuracy that probes for {len(found.kinds)} kinds of token lose by ablating latents of their own"
        " kind, less what they lose by those of others. Bands are 95 % intervals over documents.",
        draw,
    )


def removal(found: Removal) -> Plot:
    """What ablation gives back to biased probes, by the number of ablated latents."""

    def draw(axes: Axes, palette: Palette) -> None:
        _curve(axes, found.ablated, found.score, palette.series1, MARKERS[0], "mean of the pairs")
        _curve(axes, found.ablated, found.random, palette.muted, MARKERS[1], "random latents")
        for number, pair in enumerate(found.pairs, start=1):
            axes.plot(
                found.ablated,
                [_number(one) for one in pair.score],
                color=palette.series(number),
                linewidth=1,
                linestyle=(0, (3, 2)),
                label=f"{pair.target}, not {pair.spurious}",
            )
        _ablated(axes, found.ablated)
        axes.set_ylabel("share given back")
        axes.set_ylim(max(-1.0, axes.get_ylim()[0]), min(1.05, axes.get_ylim()[1]))

    return Plot(
        "labels_removal",
        "Spurious correlation removal",
        "Share of what a biased probe lacks that ablating latents of the other label gives back: 1 is all, 0 nothing,"
        " below 0 it does harm (cut at -1). The band is the 95 % interval over documents.",
        draw,
        height=3.3,
    )


def _by_concept(axes: Axes, concepts: Sequence[ConceptFigures]) -> None:
    axes.set_yticks(range(len(concepts)), [one.concept for one in concepts])
    axes.set_ylim(-0.7, len(concepts) - 0.3)
    axes.grid(visible=True, axis="x")


def _bars(axes: Axes, found: Sequence[Ranged | None], rows: Sequence[float], colour: str) -> None:
    """Intervals along the axis of the figures."""
    for one, row in zip(found, rows, strict=True):
        if one is not None and one.interval is not None:
            axes.plot(one.interval, [row, row], color=colour, linewidth=1, solid_capstyle="butt")


def _curve(axes: Axes, xs: Sequence[int], found: Sequence[Ranged], colour: str, marker: str, label: str) -> None:
    axes.plot(xs, [_number(one) for one in found], color=colour, marker=marker, label=label)
    intervals = [one.interval or (math.nan, math.nan) for one in found]
    axes.fill_between(
        xs, [low for low, _ in intervals], [high for _, high in intervals], color=colour, alpha=0.15, linewidth=0
    )


def _ablated(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(list(counts)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.axhline(0, color=axes.xaxis.label.get_color(), linewidth=0.8)
    axes.set_xlabel("latents ablated")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _number(one: Ranged) -> float:
    return math.nan if one.value is None else one.value
