"""Draw the newest training-step records of benchmarks/results.csv: seconds and peak memory per provider and shape.

python benchmarks/plot.py [--quick] [--figure docs/images/step.png]
"""

import argparse
import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from records import read

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "step.png"
COLOURS = {"granary": "tab:blue", "granary-bfloat16": "tab:cyan", "gemm": "black", "gemm-onednn": "black"}
NAMES = {"gemm": "float32 product alone, F.linear", "gemm-onednn": "float32 product alone, oneDNN"}


def newest(rows: list[dict[str, str]], machine: str) -> dict[str, dict[str, dict[str, str]]]:
    """{shape: {provider: record}} of one machine's steps; a later record replaces an earlier one."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["op"] == "step" and row["machine"] == machine:
            found.setdefault(row["shape"], {})[row["provider"]] = row
    return found


def draw(shapes: dict[str, dict[str, dict[str, str]]], machine: str, path: Path) -> None:
    """One row of two panels per shape: seconds (p50, bars from p20 to p80) and peak memory."""
    figure = Figure(figsize=(10, 2.6 * len(shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shapes), 2, squeeze=False)
    for (shape, providers), (left, right) in zip(shapes.items(), grid, strict=True):
        rows = sorted(providers.values(), key=lambda row: -float(row["p50_s"]))
        names = [NAMES.get(row["provider"], row["provider"]) for row in rows]
        colours = [COLOURS.get(row["provider"], "tab:gray") for row in rows]
        medians = [float(row["p50_s"]) for row in rows]
        spread = [
            [median - float(row["p20_s"]) for median, row in zip(medians, rows, strict=True)],
            [float(row["p80_s"]) - median for median, row in zip(medians, rows, strict=True)],
        ]
        bars = left.barh(names, medians, xerr=spread, color=colours, error_kw={"ecolor": "tab:red", "lw": 1})
        left.bar_label(bars, [f"{median:.2f}" for median in medians], padding=12, fontsize=8)
        left.set_xlabel("seconds per step")
        left.set_title(shape.replace("_", ", "), fontsize=10)
        left.margins(x=0.25)
        memory = [float(row["peak_mb"]) / 1000 for row in rows]
        bars = right.barh(names, memory, color=colours)
        right.bar_label(bars, [f"{value:.1f}" for value in memory], padding=4, fontsize=8)
        right.set_xlabel("peak memory of the process, GB")
        right.margins(x=0.15)
    threads = {row["threads"] for providers in shapes.values() for row in providers.values()}
    figure.suptitle(f"{machine}, {'/'.join(sorted(threads))} threads; p50, red: p20 to p80", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--machine", help="as in the table; default: that of the last step recorded")
    parser.add_argument("--quick", action="store_true", help="read the table and draw nothing")
    options = parser.parse_args()
    rows = read()
    machine = options.machine or next(row["machine"] for row in reversed(rows) if row["op"] == "step")
    shapes = newest(rows, machine)
    if not options.quick:
        draw(shapes, machine, options.figure)
    medians = {shape: {name: float(row["p50_s"]) for name, row in rows.items()} for shape, rows in shapes.items()}
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
