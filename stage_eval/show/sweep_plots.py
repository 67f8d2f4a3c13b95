"""The figures that compare several SAEs: quality against k and against L0, a line per expansion."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from stage_eval.results.comparison import Comparison, ComparisonRow
from stage_eval.show.plots import legend_above, numbered, power_of_ten
from stage_eval.show.theme import MARKERS, Palette, Plot

LETTER = 0.022
"""Share of an axis that a letter of a tick's label takes."""
FVU = ("fvu", "FVU", "lower is better")
RECOVERED = ("loss_recovered", "loss recovered", "higher is better")
KL = ("kl", "KL to clean", "lower is better")
DEAD = ("dead_fraction", "dead share", "lower is better")


def comparison_plots(comparison: Comparison) -> list[Plot]:
    """Every figure of a comparison; those of the second site and on are numbered."""
    plots = []
    for index, (site, rows) in enumerate(comparison.by_site.items()):
        several = len(comparison.by_site) > 1
        found = numbered([*sweep_plots(rows), *label_plots(rows), *latent_plots(rows)], index)
        plots += [replace(plot, title=f"{plot.title}, {site}") if several else plot for plot in found]
    return plots


def sweep_plots(rows: Sequence[ComparisonRow]) -> list[Plot]:
    """Quality of the SAEs of one site, against sparsity and against k."""
    quality = [FVU, RECOVERED] if has_losses(rows) else [FVU]
    plots = [pareto(rows, metric) for metric in quality]
    if all(row.k is not None for row in rows):
        costs = [KL, DEAD] if has_losses(rows) else [DEAD]
        plots += [against_k(rows, metric) for metric in (*quality, *costs)]
    return plots


def label_plots(rows: Sequence[ComparisonRow]) -> list[Plot]:
    """The supervised scores against L0, with their intervals over documents; none where an SAE has none."""
    outlines = [row.supervised for row in rows if row.supervised is not None]
    if len(outlines) < len(rows):
        return []
    count = outlines[0].ablated
    metrics = (
        ("latents_1", "accuracy of one latent", "Of probes that see one latent, mean over concepts; 0.5 is chance."),
        (
            "absorbed_fraction",
            "absorption",
            "Share of a concept's projection that others make up; lower is better.",
        ),
        (
            "perturbation",
            "TPP",
            f"What probes lose by {count} latents of their kind, less the others.",
        ),
        ("removal", "SCR", f"Share given back to biased probes by ablating {count} latents."),
    )
    return [of_labels(rows, *metric) for metric in metrics if all(getattr(one, metric[0]) for one in outlines)]


def of_labels(rows: Sequence[ComparisonRow], key: str, label: str, caption: str) -> Plot:
    """One of the supervised scores against the measured L0, a line per expansion."""

    def draw(axes: Axes, palette: Palette) -> None:
        for index, (name, group) in enumerate(lines(rows).items()):
            colour, ordered = palette.series(index), by_l0(group)
            xs, found = [value(row, "l0") for row in ordered], [getattr(row.supervised, key) for row in ordered]
            ys = [math.nan if one.value is None else one.value for one in found]
            axes.plot(xs, ys, color=colour, marker=MARKERS[index % len(MARKERS)], label=name)
            for x, one in zip(xs, found, strict=True):
                if one.interval is not None:
                    axes.plot([x, x], one.interval, color=colour, linewidth=1, alpha=0.6)
        finish(axes, sorted({round(row.l0) for row in rows if row.l0 is not None}), label)
        axes.set_xlabel("L0 (nonzero latents per token, measured)")

    title = f"{label[0].upper()}{label[1:]} against sparsity"
    return Plot(f"labels_{key}", title, f"{caption} A line per expansion, 95 % intervals over documents.", draw)


def has_losses(rows: Sequence[ComparisonRow]) -> bool:
    """Whether the language model was run for every row."""
    return all(row.ce_spliced is not None for row in rows)


def latent_plots(rows: Sequence[ComparisonRow]) -> list[Plot]:
    """Firing frequencies and decoder directions of all SAEs, laid over one another."""
    return [frequencies(rows), directions(rows)] if all(row.nearest for row in rows) else [frequencies(rows)]


def frequencies(rows: Sequence[ComparisonRow]) -> Plot:
    """Share of latents by firing frequency, an outline per SAE."""

    def draw(axes: Axes, palette: Palette) -> None:
        for row, colour, alpha, label in outlines(rows, palette):
            shares = [count / row.d_latent for count in row.frequency.latents]
            axes.stairs(shares, row.frequency.log10_edges, color=colour, alpha=alpha, linewidth=1.2, label=label)
        edges = [row.frequency.log10_edges for row in rows]
        axes.set_xlim(min(values[0] for values in edges), 0)
        axes.set_xlabel("share of tokens the latent fires on")
        axes.set_ylabel("share of latents")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        legend_above(axes)

    return Plot(
        "sweep_frequency",
        "Firing frequencies",
        "An outline per SAE; the more latents fire per token, the stronger. Dead latents are not drawn.",
        draw,
    )


def directions(rows: Sequence[ComparisonRow]) -> Plot:
    """Cosine of decoder rows with their nearest neighbour, an outline per SAE."""

    def draw(axes: Axes, palette: Palette) -> None:
        for row, colour, alpha, label in outlines(rows, palette):
            if row.nearest is not None:
                shares, edges = row.nearest.nearest, row.nearest.edges
                axes.stairs(shares, edges, color=colour, alpha=alpha, linewidth=1.2, label=label)
        axes.set_xlabel("cosine with the nearest other latent")
        axes.set_ylabel("share of latents")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        legend_above(axes)

    return Plot(
        "sweep_decoder",
        "Decoder directions",
        "How close each latent's decoder direction comes to its nearest neighbour. Mass near 1 means that latents"
        " repeat one another.",
        draw,
    )


def outlines(rows: Sequence[ComparisonRow], palette: Palette) -> Iterator[tuple[ComparisonRow, str, float, str | None]]:
    """(row, colour, opacity, label): a colour per line of the sweep, stronger with L0, labelled once."""
    for index, (name, group) in enumerate(lines(rows).items()):
        ordered = by_l0(group)
        for place, row in enumerate(ordered, start=1):
            label = name if place == len(ordered) else None
            yield row, palette.series(index), 0.35 + 0.65 * place / len(ordered), label


def by_l0(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """The rows by their measured L0."""
    return sorted(rows, key=lambda row: row.l0 or 0.0)


def lines(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    """Rows by the line they belong to: expansion, and the activation where it differs among them."""
    differs = len({row.activation for row in rows}) > 1
    grouped: dict[str, list[ComparisonRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.expansion, row.activation or "", row.k or 0)):
        grouped[f"{row.activation} x{row.expansion:g}" if differs else f"x{row.expansion:g}"].append(row)
    return dict(grouped)


def value(row: ComparisonRow, key: str) -> float:
    """A figure of the row, NaN where it is undefined: a point that is not drawn."""
    found: float | None = getattr(row, key)
    return math.nan if found is None else found


def against_k(rows: Sequence[ComparisonRow], metric: tuple[str, str, str]) -> Plot:
    """`metric` against k on a logarithmic axis; seeds of one setting are averaged into the line."""
    key, label, direction = metric

    def draw(axes: Axes, palette: Palette) -> None:
        for index, (name, group) in enumerate(lines(rows).items()):
            points: dict[float, list[float]] = defaultdict(list)
            for row in group:
                points[row.k or 0].append(value(row, key))
            xs = sorted(points)
            means = [sum(points[x]) / len(points[x]) for x in xs]
            colour = palette.series(index)
            axes.plot(xs, means, color=colour, marker=MARKERS[index % len(MARKERS)], label=name)
            errorbars(axes, group, key, colour)
        finish(axes, sorted({row.k or 0 for row in rows}), label)
        if key == "dead_fraction":
            axes.set_ylim(0, max(0.01, 1.15 * max(row.dead_fraction for row in rows)))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("k (latents per token)")

    return Plot(f"{key}_k", f"{label[0].upper()}{label[1:]} against k", f"A line per expansion; {direction}.", draw)


def pareto(rows: Sequence[ComparisonRow], metric: tuple[str, str, str]) -> Plot:
    """`metric` against the measured L0, with the front of settings that no other one beats on both."""
    key, label, direction = metric
    points = [(value(row, "l0"), value(row, key)) for row in rows]
    front = pareto_front(points, larger_is_better=key == "loss_recovered")

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot(
            [x for x, _ in front],
            [y for _, y in front],
            color=palette.muted,
            linewidth=6,
            alpha=0.22,
            solid_capstyle="round",
            label="Pareto front",
        )
        for index, (name, group) in enumerate(lines(rows).items()):
            xs, ys = ([value(row, each) for row in by_l0(group)] for each in ("l0", key))
            axes.plot(xs, ys, color=palette.series(index), marker=MARKERS[index % len(MARKERS)], label=name)
        finish(axes, sorted({round(x) for x, _ in points if math.isfinite(x)}), label)
        axes.set_xlabel("L0 (nonzero latents per token, measured)")

    return Plot(
        f"pareto_{key}",
        f"{label[0].upper()}{label[1:]} against sparsity",
        f"The band joins the settings that no other beats on both axes; {direction}.",
        draw,
    )


def pareto_front(points: Sequence[tuple[float, float]], *, larger_is_better: bool) -> list[tuple[float, float]]:
    """(L0, figure) points, by L0, that are better than every point of the same or a smaller L0."""
    sign = 1 if larger_is_better else -1
    front: list[tuple[float, float]] = []
    defined = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    for x, y in sorted(defined, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def errorbars(axes: Axes, rows: Sequence[ComparisonRow], key: str, colour: str) -> None:
    """95 % intervals over contexts, where there are any."""
    for row in rows:
        interval = row.confidence95.get(key)
        if interval:
            axes.plot([row.k or 0] * 2, interval, color=colour, linewidth=1, alpha=0.6)


def apart(ticks: Sequence[float], *, logarithmic: bool = True) -> list[float]:
    """Those of the ascending ticks whose labels, each centred on its tick, do not run into one another."""
    places = [math.log(tick) if logarithmic else tick for tick in ticks]
    span = places[-1] - places[0] or 1.0
    kept: list[int] = []
    for index, place in enumerate(places):
        if kept:
            letters = (len(tick_label(ticks[kept[-1]])) + len(tick_label(ticks[index]))) / 2 + 1
            if (place - places[kept[-1]]) / span < LETTER * letters:
                continue
        kept.append(index)
    return [ticks[index] for index in kept]


def tick_label(tick: float) -> str:
    """``64``, ``1,024``."""
    return f"{tick:,g}" if tick < 1e5 else f"{tick:g}"


def finish(axes: Axes, ticks: Sequence[float], label: str) -> None:
    """A log axis (where all are positive) with a tick at each setting that there is room for, and the legend."""
    logarithmic = bool(ticks) and min(ticks) > 0
    if logarithmic:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if ticks:
        axes.xaxis.set_major_locator(FixedLocator(apart(ticks, logarithmic=logarithmic)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: tick_label(tick)))
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, max(2 * ticks[0], 1))
    axes.set_ylabel(label)
    axes.legend(loc="best")
