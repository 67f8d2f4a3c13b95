"""The figures that compare several SAEs: quality against k and against L0, a line per expansion."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from stage_eval.show.plots import legend_above, power_of_ten
from stage_eval.show.theme import MARKERS, Palette, Plot

Row = dict[str, Any]

LABEL_WIDTH = 0.08
"""Share of an axis that a tick's label takes."""
FVU = ("fvu", "FVU", "lower is better")
RECOVERED = ("loss_recovered", "loss recovered", "higher is better")
KL = ("kl", "KL to clean", "lower is better")
DEAD = ("dead_fraction", "dead share", "lower is better")


def sweep_plots(rows: Sequence[Row]) -> list[Plot]:
    """Figures for the rows of a comparison."""
    has_losses = all(row["ce_spliced"] is not None for row in rows)
    quality = [FVU, RECOVERED] if has_losses else [FVU]
    plots = [pareto(rows, metric) for metric in quality]
    if all(row["k"] is not None for row in rows):
        costs = [KL, DEAD] if has_losses else [DEAD]
        by_k = [against(rows, "k", metric) for metric in quality]
        plots = [*plots, *by_k, *(against(rows, "k", metric) for metric in costs)]
    return plots


def latent_plots(rows: Sequence[Row]) -> list[Plot]:
    """Firing frequencies and decoder directions of all SAEs, laid over one another."""
    return [frequencies(rows), directions(rows)]


def frequencies(rows: Sequence[Row]) -> Plot:
    """Share of latents by firing frequency, an outline per SAE."""

    def draw(axes: Axes, palette: Palette) -> None:
        for row, colour, alpha, label in outlines(rows, palette):
            shares = [count / row["d_latent"] for count in row["frequency"]["latents"]]
            axes.stairs(shares, row["frequency"]["log10_edges"], color=colour, alpha=alpha, linewidth=1.2, label=label)
        edges = [row["frequency"]["log10_edges"] for row in rows]
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


def directions(rows: Sequence[Row]) -> Plot:
    """Cosine of decoder rows with their nearest neighbour, an outline per SAE."""

    def draw(axes: Axes, palette: Palette) -> None:
        for row, colour, alpha, label in outlines(rows, palette):
            nearest = row["nearest"]
            axes.stairs(nearest["nearest"], nearest["edges"], color=colour, alpha=alpha, linewidth=1.2, label=label)
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


def outlines(rows: Sequence[Row], palette: Palette) -> Iterator[tuple[Row, str, float, str | None]]:
    """(row, colour, opacity, label): a colour per line of the sweep, stronger with L0, labelled once."""
    for index, (name, group) in enumerate(lines(rows).items()):
        ordered = sorted(group, key=lambda row: row["l0"])
        for place, row in enumerate(ordered, start=1):
            label = name if place == len(ordered) else None
            yield row, palette.series(index), 0.35 + 0.65 * place / len(ordered), label


def lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by the line they belong to: expansion, and whatever else differs among them."""
    parts = [name for name in ("hook", "activation") if len({row[name] for row in rows}) > 1]
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["expansion"], *(row[name] for name in parts), row["k"] or 0)):
        label = " ".join([*(str(row[name]) for name in parts), f"x{row['expansion']:g}"])
        grouped[label].append(row)
    return dict(grouped)


def against(rows: Sequence[Row], x: str, metric: tuple[str, str, str]) -> Plot:
    """`metric` against `x` on a logarithmic axis; seeds of one setting are averaged into the line."""
    key, label, direction = metric

    def draw(axes: Axes, palette: Palette) -> None:
        for index, (name, group) in enumerate(lines(rows).items()):
            points: dict[float, list[float]] = defaultdict(list)
            for row in group:
                points[row[x]].append(row[key])
            xs = sorted(points)
            means = [sum(points[value]) / len(points[value]) for value in xs]
            colour = palette.series(index)
            axes.plot(xs, means, color=colour, marker=MARKERS[index % len(MARKERS)], label=name)
            errorbars(axes, group, x, key, colour)
        finish(axes, sorted({row[x] for row in rows}), label)
        if key == "dead_fraction":
            axes.set_ylim(0, max(0.01, 1.15 * max(row[key] for row in rows)))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(f"{x} (latents per token)")

    return Plot(f"{key}_{x}", f"{label[0].upper()}{label[1:]} against {x}", f"A line per expansion; {direction}.", draw)


def pareto(rows: Sequence[Row], metric: tuple[str, str, str]) -> Plot:
    """`metric` against the measured L0, with the front of settings that no other one beats on both."""
    key, label, direction = metric
    front = pareto_front(rows, key, larger_is_better=key == "loss_recovered")

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot(
            [row["l0"] for row in front],
            [row[key] for row in front],
            color=palette.muted,
            linewidth=6,
            alpha=0.22,
            solid_capstyle="round",
            label="Pareto front",
        )
        for index, (name, group) in enumerate(lines(rows).items()):
            colour = palette.series(index)
            marker = MARKERS[index % len(MARKERS)]
            ordered = sorted(group, key=lambda row: row["l0"])
            axes.plot(
                [row["l0"] for row in ordered], [row[key] for row in ordered], color=colour, marker=marker, label=name
            )
        finish(axes, sorted({round(row["l0"]) for row in rows}), label)
        axes.set_xlabel("L0 (nonzero latents per token, measured)")

    return Plot(
        f"pareto_{key}",
        f"{label[0].upper()}{label[1:]} against sparsity",
        f"The band joins the settings that no other beats on both axes; {direction}.",
        draw,
    )


def pareto_front(rows: Sequence[Row], key: str, *, larger_is_better: bool) -> list[Row]:
    """Rows, by L0, that are better in `key` than every row of the same or a smaller L0."""
    sign = 1 if larger_is_better else -1
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["l0"], -sign * row[key])):
        if not front or sign * row[key] > sign * front[-1][key]:
            front.append(row)
    return front


def errorbars(axes: Axes, rows: Sequence[Row], x: str, key: str, colour: str) -> None:
    """95 % intervals over contexts, where there are any."""
    for row in rows:
        interval = row["confidence95"].get(key)
        if interval:
            axes.plot([row[x]] * 2, interval, color=colour, linewidth=1, alpha=0.6)


def apart(ticks: Sequence[float]) -> list[float]:
    """Those of the ascending ticks whose labels do not run into one another on a logarithmic axis."""
    span = ticks[-1] / ticks[0] if ticks[0] > 0 else math.inf
    kept: list[float] = []
    for tick in ticks:
        if not kept or kept[-1] <= 0 or tick / kept[-1] >= span**LABEL_WIDTH:
            kept.append(tick)
    return kept


def finish(axes: Axes, ticks: Sequence[float], label: str) -> None:
    """A log axis (where all are positive) with a tick at each of at most eight settings, and the legend."""
    if min(ticks) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if len(ticks) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(apart(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 2, max(2 * ticks[0], 1))
    axes.set_ylabel(label)
    axes.legend(loc="best")
