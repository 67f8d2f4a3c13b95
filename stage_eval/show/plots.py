"""The figures of one evaluation, drawn from what eval.json holds."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from stage_eval.results.evaluation import Evaluation, TrainingCurve
from stage_eval.results.figures import ActivationFigures, DecoderFigures, Downstream, GroupFigures, LatentFigures
from stage_eval.show.supervised_plots import supervised_plots
from stage_eval.show.theme import Palette, Plot

FEWEST = 50
LEGEND_LETTERS, LEGEND_ROWS = 64, 3
"""What a legend may take above the axes."""
NOT_DRAWN = f"Groups of fewer than {FEWEST} tokens are not drawn."


def evaluation_plots(report: Evaluation) -> list[Plot]:
    """Every figure that this evaluation has the data for."""
    plots = [firing_histogram(report.latents)]
    if report.decoder is not None:
        plots.append(decoder_similarity(report.decoder))
    for index, figures in enumerate(report.described.values()):
        plots += numbered(activation_plots(figures), index)
    plots += [fvu_by(report.breakdown.position, "position"), fvu_by(report.breakdown.frequency, "frequency")]
    if report.downstream is not None:
        plots.append(loss_bars(report.downstream))
        plots += [loss_by(report.breakdown.position, "position"), loss_by(report.breakdown.frequency, "frequency")]
    if report.supervised is not None:
        plots += supervised_plots(report.supervised)
    if report.training is not None:
        plots.append(training_curve(report.training, report.fvu))
    return plots


def numbered(plots: Sequence[Plot], index: int) -> list[Plot]:
    """Plots with the names of the index-th place: those of the first are called as they are."""
    return [replace(plot, name=f"{plot.name}-{index}") if index else plot for plot in plots]


def activation_plots(activations: ActivationFigures) -> list[Plot]:
    """What the activations themselves are like; the same for all SAEs of a hook."""
    plots = [norms_by_position(activations), largest_dimensions(activations), dimension_spectrum(activations)]
    if activations.store_norm_by_position:  # stores of older versions have none
        plots.insert(1, store_norms(activations))
    return plots


def loss_bars(downstream: Downstream) -> Plot:
    """Cross-entropy clean, spliced, mean- and zero-ablated."""
    bars = [("clean", "ce_clean"), ("spliced", "ce_spliced"), ("mean-ablated", "ce_mean"), ("zero-ablated", "ce_zero")]

    def draw(axes: Axes, palette: Palette) -> None:
        colours = [palette.muted, palette.series1, palette.series2, palette.series5]
        values = [getattr(downstream, key) for _, key in bars]
        labels = [label for label, _ in bars]
        axes.barh(labels, values, color=colours, height=0.62)
        widest = max(values)
        for row, (_, key) in enumerate(bars):
            interval = downstream.confidence95[key]
            end = values[row]
            if interval:
                axes.plot(interval, [row, row], color=palette.text, linewidth=1, solid_capstyle="butt")
                end = max(end, interval[1])
            axes.annotate(
                f"{values[row]:.3f}", (end, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_xlim(0, widest * 1.16)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("cross-entropy, nats per token")
        axes.tick_params(axis="y", labelsize=8, labelcolor=palette.text)

    return Plot(
        "cross_entropy",
        "Next-token loss",
        "The model's loss with the activation left alone, replaced by the reconstruction, by the training mean, and by"
        " zero. Lines are 95 % intervals over contexts.",
        draw,
        height=2.4,
    )


def firing_histogram(latents: LatentFigures) -> Plot:
    """How often latents fire, on a log axis, with the dense region marked."""
    edges, counts = latents.histogram.log10_edges, latents.histogram.latents
    bound = math.log10(latents.dense_frequency_bound)

    def draw(axes: Axes, palette: Palette) -> None:
        colours = [palette.series5 if left >= bound - 1e-9 else palette.series1 for left in edges[:-1]]
        widths = [right - left for left, right in pairwise(edges)]
        axes.bar(
            edges[:-1], counts, width=widths, align="edge", color=colours, edgecolor=palette.surface, linewidth=0.6
        )
        axes.axvline(bound, color=palette.muted, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlabel("share of tokens the latent fires on")
        axes.set_ylabel("latents")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        axes.set_xticks(range(math.floor(edges[0]), 1))
        axes.set_xlim(edges[0], 0)

    return Plot(
        "firing_frequency",
        "Firing frequency",
        f"{latents.dead:,} of {latents.d_latent:,} latents never fired on the held-out tokens and are not drawn;"
        f" {latents.dense:,} fire on more than {latents.dense_frequency_bound:.0%} of them (right of the line).",
        draw,
    )


def fvu_by(groups: GroupFigures, by: str) -> Plot:
    """FVU along positions or token frequencies."""
    points = well_sampled(groups.edges, groups.fvu, groups.tokens, by)

    def draw(axes: Axes, palette: Palette) -> None:
        log_line(axes, points, palette.series1, by)
        axes.set_ylabel("FVU")
        axes.set_ylim(bottom=0)

    where = "position in the document" if by == "position" else "how common the token is"
    return Plot(
        f"fvu_by_{by}",
        f"Reconstruction by {where}",
        f"Fraction of variance unexplained, the variance taken about the training mean. {NOT_DRAWN}",
        draw,
    )


def loss_by(groups: GroupFigures, by: str) -> Plot:
    """Increase of cross-entropy along positions or label frequencies."""
    points = well_sampled(groups.edges, groups.ce_increase or [], groups.predictions or [], by)

    def draw(axes: Axes, palette: Palette) -> None:
        log_line(axes, points, palette.series2, by)
        axes.axhline(0, color=palette.muted, linewidth=0.8)
        axes.set_ylabel("increase, nats per token")

    where = "position in the document" if by == "position" else "how common the predicted token is"
    return Plot(
        f"loss_by_{by}",
        f"Added loss by {where}",
        f"Cross-entropy with the reconstruction spliced in, minus the clean cross-entropy. {NOT_DRAWN}",
        draw,
    )


def dimension_spectrum(activations: ActivationFigures) -> Plot:
    """Spread and mean of every activation dimension, largest first."""
    spectrum = activations.spectrum

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot(spectrum.rank, spectrum.std, color=palette.series1, label="standard deviation")
        axes.plot(spectrum.rank, spectrum.abs_mean, color=palette.series2, label="absolute mean")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("dimension, each curve in falling order")
        axes.legend(loc="lower left")

    return Plot(
        "activation_spectrum",
        "Activation dimensions",
        f"Training tokens: mean norm {activations.mean_norm:.3g}. A steep left end means that a few"
        " dimensions carry most of the variance.",
        draw,
    )


def norms_by_position(activations: ActivationFigures) -> Plot:
    """Percentiles of the norm on the evaluated tokens, along positions."""
    groups = activations.norm_by_position
    bos = activations.bos_norm
    curves = {
        name: well_sampled(groups.edges, getattr(groups, name), groups.tokens, "position")
        for name in ("p5", "p50", "p95", "p99", "max")
    }
    apart = f" BOS is not in it: its median norm is {bos.p50:.3g}." if bos is not None else ""
    return Plot(
        "norm_by_position",
        "Activation norm by position",
        f"Length of the activation on the evaluated tokens, by the position that the model saw.{apart} {NOT_DRAWN}",
        lambda axes, palette: draw_norms(axes, palette, curves),
    )


def store_norms(activations: ActivationFigures) -> Plot:
    """Percentiles of the norm on the store's training tokens, along the context."""
    groups = activations.store_norm_by_position
    curves = {
        name: [
            (centre(group.first, group.last + 1, "position"), getattr(group, name))
            for group in groups
            if group.tokens >= FEWEST
        ]
        for name in ("p5", "p50", "p95", "p99")
    }
    return Plot(
        "store_norm_by_position",
        "Norm by position, training tokens",
        f"The same for what the store holds for training, by position in the context. {NOT_DRAWN}",
        lambda axes, palette: draw_norms(axes, palette, curves),
    )


def draw_norms(axes: Axes, palette: Palette, curves: dict[str, list[tuple[float, float]]]) -> None:
    """A band from 5 to 95 %, and the other percentiles as lines."""
    low, high = ([y for _, y in curves[name]] for name in ("p5", "p95"))
    xs = [x for x, _ in curves["p50"]]
    axes.fill_between(xs, low, high, color=palette.series1, alpha=0.2, linewidth=0, label="5 to 95 %")
    log_line(axes, curves["p50"], palette.series1, "position", label="median")
    log_line(axes, curves["p99"], palette.series2, "position", label="99 %")
    if "max" in curves:
        log_line(axes, curves["max"], palette.series5, "position", label="largest")
    if low and max(y for points in curves.values() for _, y in points) > 30 * min(low):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("norm")
    legend_above(axes)


def largest_dimensions(activations: ActivationFigures) -> Plot:
    """The largest magnitude of the dimensions that reach furthest, with and without BOS."""
    largest = activations.largest
    rows = largest.dimensions

    def draw(axes: Axes, palette: Palette) -> None:
        places = range(len(rows))
        reach = [max(row.max, row.max_bos) for row in rows]
        axes.hlines(places, largest.median_rms, reach, color=palette.grid, linewidth=1.2, zorder=1)
        axes.plot([row.max for row in rows], places, "o", color=palette.series1, label="evaluated tokens")
        if any(row.max_bos > 0 for row in rows):
            axes.plot([row.max_bos for row in rows], places, "D", color=palette.series2, label="BOS")
        axes.axvline(largest.median_rms, color=palette.muted, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(
            LogLocator(base=10, subs=(1, 2, 5) if max(reach) < 50 * largest.median_rms else (1,))
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(left=largest.median_rms / 2)
        axes.set_yticks(places, [str(row.dimension) for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_ylabel("dimension")
        axes.set_xlabel("largest magnitude")
        legend_above(axes)

    count = "No dimension exceeds" if not largest.massive else f"{largest.massive} dimensions exceed"
    return Plot(
        "largest_dimensions",
        "Largest dimensions",
        f"The line is the RMS of the median dimension. {count} {largest.massive_ratio:.0f} times it (massive"
        " activations).",
        draw,
    )


def decoder_similarity(decoder: DecoderFigures) -> Plot:
    """Cosine of each decoder direction with its nearest neighbour, and what random directions would give."""
    edges, counts, random = decoder.edges, decoder.nearest, decoder.nearest_random

    def draw(axes: Axes, palette: Palette) -> None:
        axes.stairs(counts, edges, fill=True, color=palette.series1, alpha=0.85, label="this SAE")
        axes.stairs(random, edges, color=palette.series2, linewidth=1.4, label="random directions")
        axes.set_xlabel("cosine with the nearest other latent")
        axes.set_ylabel("share of latents")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend(loc="upper left" if (decoder.nearest_median or 0) > 0.5 else "upper right")

    return Plot(
        "decoder_cosine",
        "Decoder directions",
        "How close each latent's decoder direction comes to its nearest neighbour. Mass near 1 means that latents"
        " repeat one another.",
        draw,
    )


def training_curve(training: TrainingCurve, held_out: float | None) -> Plot:
    """Training FVU, as the run logged it, and the FVU that was found on the evaluated tokens."""
    points = [(x, y) for x, y in zip(training.tokens, training.fvu, strict=True) if x is not None and y is not None]
    logged = [fvu for _, fvu in points]
    found = math.nan if held_out is None else held_out

    def draw(axes: Axes, palette: Palette) -> None:
        axes.plot([x for x, _ in points], logged, color=palette.series1, label="training batches")
        axes.axhline(found, color=palette.series2, linewidth=1.2, linestyle=(0, (4, 3)), label="held out, now")
        axes.set_xlabel("training tokens")
        axes.set_ylabel("FVU")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        top = sorted(logged)[int(0.97 * (len(logged) - 1))]
        axes.set_ylim(0, max(top, held_out or 0.0) * 1.1)
        axes.legend(loc="upper right")

    return Plot("training", "Training", "The fraction of variance unexplained while the SAE was trained.", draw)


def log_line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, by: str, label: str | None = None) -> None:
    """A marked line over a logarithmic axis of positions or frequencies."""
    axes.plot([x for x, _ in points], [y for _, y in points], color=colour, marker="o", markersize=3, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    if by == "position":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("position")
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(math.log10(value))))
        axes.set_xlabel("share of all held-out tokens")


def legend_above(axes: Axes) -> None:
    """The legend over the axes, where no curve can run through it; within them if it has too many entries for that."""
    names = axes.get_legend_handles_labels()[1]
    if not names:
        return
    columns = min(4, len(names), max(1, LEGEND_LETTERS // (max(map(len, names)) + 6)))
    if len(names) > LEGEND_ROWS * columns:
        axes.legend(loc="best")
        return
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.3, columnspacing=1.2)


def well_sampled(
    edges: Sequence[float], values: Sequence[float | None], counts: Sequence[int], by: str
) -> list[tuple[float, float]]:
    """(where it is drawn, value) of every group of at least `FEWEST` tokens: smaller ones are noise."""
    return [
        (centre(low, high, by), value)
        for (low, high), value, count in zip(pairwise(edges), values, counts, strict=False)
        if value is not None and count >= FEWEST
    ]


def centre(low: float, high: float, by: str) -> float:
    """Where a group is drawn: the geometric middle; integer positions run up to high - 1."""
    if by == "position":
        return math.sqrt(max(low, 0.7) * max(high - 1, 0.7))
    return math.sqrt(low * high)


def power_of_ten(exponent: float) -> str:
    """``100 %``, ``1 %``, ``0.01 %`` for 0, -2, -4."""
    return f"{10.0 ** (exponent + 2):g} %"


def thousands(value: float) -> str:
    """``2M``, ``500k``."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
