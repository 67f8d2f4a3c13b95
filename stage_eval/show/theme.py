"""One look for all figures: drawn once for PNG in fixed colours, once as SVG whose colours follow the page.

An inline SVG takes its colours from CSS variables, so that one copy serves light and dark. Matplotlib can't write
variables; it draws with placeholder colours that are replaced in the text of the SVG.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.6, 2.9
"""Inches; small on purpose, so that 8-point text is still 8 points on a phone."""

SERIES = ("series1", "series2", "series3", "series4", "series5", "series6")
MARKERS = ("o", "s", "D", "^", "v", "P")


@dataclass(frozen=True)
class Palette:
    """Colours by role, as matplotlib takes them."""

    text: str
    muted: str
    grid: str
    surface: str
    good: str
    bad: str
    series1: str
    series2: str
    series3: str
    series4: str
    series5: str
    series6: str

    def series(self, index: int) -> str:
        """The colour of the index-th line; colours repeat after six."""
        colour: str = getattr(self, SERIES[index % len(SERIES)])
        return colour


# Chosen to differ in lightness too, so that lines stay apart in grey and for colour-blind readers.
LIGHT = Palette(
    text="#1f2328",
    muted="#59636e",
    grid="#e3e1da",
    surface="#ffffff",
    good="#2f7d5b",
    bad="#b4483b",
    series1="#2b5c8a",
    series2="#c27c0e",
    series3="#2f7d5b",
    series4="#8a4f9e",
    series5="#b4483b",
    series6="#4b9db5",
)
DARK = Palette(
    text="#e6e4de",
    muted="#9aa3ad",
    grid="#34383e",
    surface="#1b1e23",
    good="#6cc19a",
    bad="#e58a7c",
    series1="#7fb2e5",
    series2="#e9b04c",
    series3="#6cc19a",
    series4="#c795d8",
    series5="#e58a7c",
    series6="#82cfe3",
)
PLACEHOLDERS = Palette(**{field.name: f"#01{index:02x}fe" for index, field in enumerate(fields(Palette), start=16)})

Draw = Callable[[Axes, Palette], None]
"""Draws one figure into its axes."""


@dataclass(frozen=True)
class Plot:
    """A figure, what it is called on disk, and the sentence that explains it."""

    name: str
    title: str
    caption: str
    draw: Draw
    height: float = HEIGHT


def to_png(plot: Plot, palette: Palette = LIGHT, dpi: int = 200) -> bytes:
    """The figure with its title, as PNG."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(style(palette)):
        figure = build(plot, palette, titled=True)
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=palette.surface, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(plot: Plot) -> str:
    """The figure as an ``<svg>`` element for a page that defines the CSS variables of `css_variables`."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**style(PLACEHOLDERS), "svg.fonttype": "none", "svg.hashsalt": plot.name}):
        build(plot, PLACEHOLDERS, titled=False).savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Identifiers are unique within one figure only, and a page holds many.
    svg = re.sub(r'\bid="', f'id="{plot.name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{plot.name}-", svg)
    svg = re.sub(r'href="#', f'href="#{plot.name}-', svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # inline SVG needs none, and nothing may look like a request
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [^;\"]*?\d+(?:\.\d+)?px) [^;\"]*", r"\1 var(--sans)", svg)
    for field in fields(Palette):
        svg = svg.replace(getattr(PLACEHOLDERS, field.name), f"var(--{field.name})")
    return svg.strip()


def css_variables(palette: Palette) -> str:
    """The palette as CSS declarations."""
    return " ".join(f"--{field.name}: {getattr(palette, field.name)};" for field in fields(Palette))


def build(plot: Plot, palette: Palette, *, titled: bool) -> Figure:
    """Lay the figure out; no pyplot, hence no global state and no display."""
    figure = Figure(figsize=(WIDTH, plot.height), layout="constrained")
    axes = figure.subplots()
    plot.draw(axes, palette)
    if titled:
        figure.suptitle(plot.title, x=0.02, ha="left", fontsize=10, fontweight="bold", color=palette.text)
    return figure


def style(palette: Palette) -> Any:
    """Matplotlib parameters: quiet axes, horizontal grid, no box."""
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "axes.labelsize": 8,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.unicode_minus": False,
        "grid.color": palette.grid,
        "grid.linewidth": 0.7,
        "text.color": palette.text,
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "ytick.major.size": 0,
        "xtick.minor.visible": False,
        "ytick.minor.visible": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "legend.labelcolor": palette.muted,
        "figure.facecolor": "none",
    }
