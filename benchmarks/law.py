"""FVU as a function of latents and tokens, fitted and drawn: ``((A F^-a)^q + (B T^-b)^q)^(1/q)``.

``A F^-a`` is what so many latents allow, ``B T^-b`` what so many tokens teach, and the scarcer of the two decides: q
says how sharply. The sum of powers that Hoffmann et al. 2022 (2203.15556) fit to losses of language models is near
q = 1; that of SAEs has a corner, since after few tokens more latents gain nothing. Gao et al. 2024 (2406.04093) fit
SAEs by powers of latents and k. Points are rows of ``wide.py``, all of one k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

STARTS = tuple(product((0.2, 1.0), (0.2, 1.0), (1.0, 4.0)))
"""Of a, b and q."""


@dataclass(frozen=True)
class Law:
    """The fit; `latents` and `tokens` are exponents."""

    by_latents: float
    latents: float
    by_tokens: float
    tokens: float
    sharpness: float
    error: float
    """Root mean square of the relative errors at the points."""

    def at(self, latents: float, tokens: float) -> float:
        """FVU that it foretells."""
        limits = np.array([self.by_latents * latents**-self.latents, self.by_tokens * tokens**-self.tokens])
        return float((limits**self.sharpness).sum() ** (1 / self.sharpness))

    def __str__(self) -> str:
        limits = f"{self.by_latents:.3g} F^-{self.latents:.2f} and {self.by_tokens:.3g} T^-{self.tokens:.2f}"
        return f"{limits}, q {self.sharpness:.1f}, relative error {self.error:.1%}"


Point = tuple[float, float, float]
"""Latents, tokens, FVU."""


def fit(points: Sequence[Point]) -> Law:
    """The law with the least squared relative error. ValueError for fewer than five points, as it has five numbers, or
    a single number of latents or of tokens, which leaves an exponent open."""
    latents, tokens, fvu = np.asarray(points, dtype=float).T
    if len(fvu) < 5 or min(len(set(latents)), len(set(tokens))) < 2:
        raise ValueError("the law has five numbers: it takes five points, over several latents and several tokens")
    # Relative to the middle, so that both limits begin at the points.
    middles = [float(np.median(column)) for column in (latents, tokens, fvu)]
    f, t, y = (torch.from_numpy(np.log(c / m)) for c, m in zip((latents, tokens, fvu), middles, strict=True))

    def error(at: torch.Tensor) -> torch.Tensor:
        """Mean square; `at` is [log A, log a, log B, log b, log q] in those units."""
        a, b, q = at[1].exp(), at[3].exp(), at[4].exp()
        foretold = torch.logaddexp(q * (at[0] - a * f), q * (at[2] - b * t)) / q
        return (torch.expm1(foretold - y) ** 2).mean()

    starts = [torch.tensor([1.0, a, 1.0, b, q], dtype=torch.float64).log() for a, b, q in STARTS]
    found = min((_descended(error, start) for start in starts), key=error)
    a, b, q = found[[1, 3, 4]].exp().tolist()
    factors = float(found[0].exp()) * middles[2] * middles[0] ** a, float(found[2].exp()) * middles[2] * middles[1] ** b
    return Law(factors[0], a, factors[1], b, q, float(error(found)) ** 0.5)


def _descended(error: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """Where the least of `error` near `start` is."""
    at = start.clone().requires_grad_()
    descent = torch.optim.LBFGS([at], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        descent.zero_grad()
        found = error(at)
        found.backward()
        return found

    descent.step(closure)
    return at.detach()


def draw(trainers: dict[str, tuple[list[Point], Law]], title: str, path: Path) -> None:
    """One panel per trainer: FVU against latents, a colour per number of tokens, the fit dashed; dotted what it
    foretells with tokens without end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    from stage_eval.show.theme import LIGHT, style

    lengths = sorted({tokens for points, _ in trainers.values() for _, tokens, _ in points})
    colors = {tokens: LIGHT.series(i) for i, tokens in enumerate(lengths)}
    widths = sorted({latents for points, _ in trainers.values() for latents, _, _ in points})
    with rc_context(style(LIGHT)):
        figure = Figure(figsize=(5.5 * len(trainers), 4.2), layout="constrained")
        panels = figure.subplots(1, len(trainers), sharey=True, squeeze=False)[0]
        for panel, (trainer, (points, law)) in zip(panels, trainers.items(), strict=True):
            for tokens in sorted({tokens for _, tokens, _ in points}):
                mine = sorted((latents, fvu) for latents, seen, fvu in points if seen == tokens)
                color = colors[tokens]
                panel.plot(*zip(*mine, strict=True), "o", color=color)
                curve = np.geomspace(mine[0][0], mine[-1][0], 50)
                panel.plot(curve, [law.at(latents, tokens) for latents in curve], "--", color=color, linewidth=1.2)
                panel.annotate(
                    f"{tokens / 1e6:g} M", mine[-1], (8, 0), textcoords="offset points", va="center", color=color
                )
            own = sorted({latents for latents, _, _ in points})
            panel.plot(own, [law.at(latents, np.inf) for latents in own], ":", color=LIGHT.muted, linewidth=1)
            panel.set(xscale="log", yscale="log", xlim=(widths[0] / 1.2, widths[-1] * 1.6))
            panel.set_xticks(widths, [f"{width:,.0f}" for width in widths], fontsize=8)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.set_title(trainer, loc="left", fontsize=10)
            panel.set_xlabel(f"latents F\n{law}", fontsize=8)
        panels[0].set_ylabel("held-out FVU, by training tokens")
        figure.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor=LIGHT.surface)
