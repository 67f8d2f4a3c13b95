"""``curves.png``: how a training run went, from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from shared.basics.files import replacing
from shared.basics.metrics_file import read_columns
from shared.basics.run_folder import RunFolder

PANELS = {
    "loss": "loss",
    "fvu": "FVU (training batches)",
    "l0": "L0",
    "dead_fraction": "dead share",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "wait_share": "share of time waiting for data",
}
LOGARITHMIC = {"loss", "fvu", "grad_norm"}
# Of the panels, in shares: a layout that is searched for draws everything four times, and a sweep draws many.
PLACES = {"left": 0.05, "right": 0.99, "bottom": 0.08, "top": 0.95, "wspace": 0.26, "hspace": 0.35}
MOST_POINTS = 4000  # beyond what a picture shows
SHARES = {"dead_fraction", "wait_share"}


def draw_curves(folder: Path) -> Path | None:
    """Draw the curves of a run folder and return the picture; None with fewer than two logging steps."""
    columns = read_columns(folder, ["tokens", *PANELS])
    every = max(1, len(columns["tokens"]) // MOST_POINTS)
    # From the end: the last point is where the run stands.
    values = {name: column[::-every][::-1].tolist() for name, column in columns.items()}
    if len(values["tokens"]) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6), dpi=110)
    for axes, (name, title) in zip(figure.subplots(2, 4, gridspec_kw=PLACES).flat, PANELS.items(), strict=True):
        axes.plot(values["tokens"], values[name], linewidth=1.2)
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        _scale(axes, name, values[name])
    path = RunFolder(folder).curves
    with replacing(path) as file:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(file)
    return path


def _scale(axes: Any, name: str, values: list[float]) -> None:
    """Axes that a reader takes in at a glance: 200k tokens, 0.02, 5 %."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if name in LOGARITHMIC and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.1, max(values) * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    least = 0.01 if name in SHARES else 0.0
    axes.set_ylim(0, max(1.1 * max(values), least) or 0.01)
    if name in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif name == "tokens_per_s":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif name == "lr":
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
