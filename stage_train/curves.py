"""``curves.png``: how a training run went, from its metrics.jsonl."""

from pathlib import Path

from stage_train.loggers import read_metrics

PANELS = {
    "fvu": "FVU (training batches)",
    "l0": "L0",
    "dead_fraction": "dead share",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
}


def draw_curves(folder: Path) -> Path | None:
    """Draw the curves of a run folder and return the picture; None with fewer than two logging steps."""
    lines = read_metrics(folder)
    if len(lines) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    tokens = [line["tokens"] for line in lines]
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        values = [line[name] for line in lines]
        axes.plot(tokens, values, linewidth=1.2)
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        if name in ("fvu", "grad_norm") and min(values) > 0:
            axes.set_yscale("log")
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path
