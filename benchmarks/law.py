"""FVU as a function of latents and tokens: ``E + A F^-a + B T^-b``, fitted and drawn.

The form is that of Hoffmann et al. 2022 (2203.15556) for losses of language models; Gao et al. 2024 fit SAEs by powers
of latents and k. Points are rows of ``wide.py``, all of one k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EXPONENTS = np.linspace(0.02, 2.0, 12)
"""Tried for both, then as many on each side of the best, up to two of the last steps away."""
REFINEMENTS = 6


@dataclass(frozen=True)
class Law:
    """The fit; `latents` and `tokens` are exponents."""

    floor: float
    by_latents: float
    latents: float
    by_tokens: float
    tokens: float
    error: float
    """Root mean square of the relative errors at the points."""

    def at(self, latents: float, tokens: float) -> float:
        """FVU that it foretells."""
        return self.floor + self.by_latents * latents**-self.latents + self.by_tokens * tokens**-self.tokens

    def __str__(self) -> str:
        terms = f"{self.by_latents:.3g} F^-{self.latents:.2f} + {self.by_tokens:.3g} T^-{self.tokens:.2f}"
        return f"{self.floor:.4f} + {terms}, relative error {self.error:.1%}"


Point = tuple[float, float, float]
"""Latents, tokens, FVU."""


def fit(points: Sequence[Point]) -> Law:
    """The law with the least squared relative error, factors not negative. ValueError for fewer than five numbers to
    fit five by, or a single number of latents or of tokens, which leaves an exponent open."""
    found = np.asarray(points, dtype=float)
    if len(found) < 5 or min(len(set(found[:, 0])), len(set(found[:, 1]))) < 2:
        raise ValueError("the law has five numbers: it takes five points, over several latents and several tokens")
    tries, step = [EXPONENTS, EXPONENTS], float(EXPONENTS[1] - EXPONENTS[0])
    best: Law | None = None
    for _ in range(REFINEMENTS):
        tried = [_factors(found, a, b) for a in tries[0] for b in tries[1]]
        best = min([*tried, *([best] if best else [])], key=lambda law: law.error)
        tries = [
            np.linspace(max(middle - 2 * step, 1e-3), middle + 2 * step, len(EXPONENTS))
            for middle in (best.latents, best.tokens)
        ]
        step *= 4 / (len(EXPONENTS) - 1)
    assert best is not None
    return best


def _factors(points: np.ndarray, a: float, b: float) -> Law:
    """The best factors at given exponents: least squares without negative ones, over all choices of which are 0."""
    latents, tokens, fvu = points.T
    # Relative to the middle, so that columns are alike in size.
    scale = np.array([1.0, np.median(latents) ** -a, np.median(tokens) ** -b])
    columns = np.stack([np.ones_like(fvu), latents**-a, tokens**-b], 1) / scale / fvu[:, None]
    best = (np.inf, np.zeros(3))
    for kept in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):
        solved = np.linalg.lstsq(columns[:, kept], np.ones_like(fvu), rcond=None)[0]
        if (solved >= 0).all():
            factors = np.zeros(3)
            factors[kept] = solved
            error = float(np.sqrt(np.mean((columns @ factors - 1) ** 2)))
            best = min(best, (error, factors), key=lambda pair: pair[0])
            if len(kept) == 3:  # fewer can't be better
                break
    floor, by_latents, by_tokens = best[1] / scale
    return Law(float(floor), float(by_latents), float(a), float(by_tokens), float(b), best[0])


def draw(trainers: dict[str, list[Point]], title: str, path: Path) -> None:
    """One panel per trainer: FVU against latents, a line per number of tokens, dashes where the fit has it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(trainers), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(trainers), sharey=True, squeeze=False)[0]
    for panel, (trainer, points) in zip(panels, trainers.items(), strict=True):
        for tokens in sorted({point[1] for point in points}):
            mine = sorted((latents, fvu) for latents, seen, fvu in points if seen == tokens)
            (line,) = panel.plot(*zip(*mine, strict=True), "o", label=f"{tokens / 1e6:g} M tokens")
            try:
                law = fit(points)
            except ValueError:
                continue
            curve = np.geomspace(mine[0][0], mine[-1][0], 50)
            panel.plot(curve, [law.at(latents, tokens) for latents in curve], "--", color=line.get_color())
            panel.set_xlabel(f"latents F\n{law}", fontsize=8)
        panel.set(title=trainer, xscale="log", yscale="log")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("held-out FVU")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
