"""From judgements to figures: balanced accuracy, F1, area under the curve, Pearson, each with a 95 % interval.

An interval of a share is Wilson's (1927); that of balanced accuracy, the mean of two independent shares, combines
theirs by the method of variance recovery (Newcombe 1998). The others are bootstraps over examples (Efron 1979), active
and silent ones drawn apart. A judgement without an answer is in no figure: it is counted beside them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from stage_inspect.explain.examples import Tested
from stage_inspect.explain.pictures import TestedPicture

MOST_SHOWN = 16  # wrong examples that are kept whole

Doubles = npt.NDArray[np.float64]
Interval = tuple[float, float]

Z = 1.959963984540054  # of the normal distribution, two-sided 95 %
RESAMPLES = 1000
ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Judgement:
    """What was said of one example."""

    truth: bool
    said: bool | None
    """None: there was no answer, or none that could be read."""
    of: Tested | TestedPicture
    certainty: float | None = None
    """The larger, the surer that it is active: a probability, or a similarity."""
    reason: str | None = None
    """Why there is none, where `said` is None."""
    is_endpoints: bool = False
    """Whether the endpoint failed, so that asking again may help."""


@dataclass(frozen=True)
class Result:
    """A score: None where nothing could be judged, `details` with the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def missing(cls, reason: str) -> "Result":
        """No score, and why."""
        return cls(None, details={"why": reason})

    @property
    def brief(self) -> dict[str, Any]:
        """Return the figures of a control, beside the score that it controls."""
        kept: dict[str, Any] = {key: self.details[key] for key in ("why", "f1", "auc", "counts") if key in self.details}
        return {"value": self.value, "low": self.low, "high": self.high, **kept}


def wilson(hits: int, total: int) -> Interval:
    """Interval of a share; (0, 1) of none."""
    if not total:
        return 0.0, 1.0
    share, spread = hits / total, Z * Z / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_of_shares(one: tuple[int, int], other: tuple[int, int]) -> tuple[float, float, float]:
    """(mean, low, high) of two shares, each (hits, total)."""
    shares = [hits / total for hits, total in (one, other)]
    ends = [wilson(hits, total) for hits, total in (one, other)]
    mean = sum(shares) / 2
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, ends, strict=True))) / 2
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, ends, strict=True))) / 2
    return mean, max(0.0, mean - below), min(1.0, mean + above)


def auc(active: Doubles, silent: Doubles) -> float:
    """The chance that an active example has the larger certainty, ties by half."""
    return float(auc_of(active, silent, np.ones((1, len(active))), np.ones((1, len(silent))))[0])


def auc_of(active: Doubles, silent: Doubles, often_RA: Doubles, often_RS: Doubles) -> Doubles:
    """`auc` [R], where in draw r the examples occur so often."""
    wins_AS = (active[:, None] > silent) + 0.5 * (active[:, None] == silent)
    found: Doubles = ((often_RA @ wins_AS) * often_RS).sum(1) / (often_RA.sum(1) * often_RS.sum(1))
    return found


def f1_of(active: Doubles, silent: Doubles, often_RA: Doubles, often_RS: Doubles) -> Doubles:
    """2 TP / (2 TP + FP + FN) [R] from what was said, 0 or 1; 0 where no yes is right."""
    right_R, wrong_R = often_RA @ active, often_RS @ silent
    found: Doubles = 2 * right_R / (right_R + wrong_R + often_RA.sum(1))
    return found


def classified(judgements: Sequence[Judgement], why_no_certainty: str) -> Result:
    """Balanced accuracy of yes and no, (TPR + TNR) / 2, with F1, the area under the curve, and each tenth by rank.

    None where of the active or of the silent examples no answer could be read.
    """
    read = [one for one in judgements if one.said is not None]
    active, silent = ([one for one in read if one.truth == truth] for truth in (True, False))
    details: dict[str, Any] = {"counts": counts(judgements), "unread": unread(judgements), "failed": failed(judgements)}
    details["judged"] = judged(judgements)
    if not active or not silent:
        return Result(None, details={"why": "no answer could be read", **details})
    right = sum(not one.said for one in silent)
    value, low, high = mean_of_shares((sum(bool(one.said) for one in active), len(active)), (right, len(silent)))
    said = [np.array([float(bool(one.said)) for one in ones]) for ones in (active, silent)]
    details["f1"] = figure(f1_of, said[0], said[1])
    details["auc"] = area(active, silent, why_no_certainty)
    details["by_quantile"] = [
        {"quantile": quantile, **tenth([one for one in active if one.of.quantile == quantile], silent, right)}
        for quantile in sorted({one.of.quantile for one in active if one.of.quantile is not None})
    ]
    return Result(value, low, high, details)


def tenth(active: Sequence[Judgement], silent: Sequence[Judgement], right: int) -> dict[str, Any]:
    """One tenth of the active examples against all silent ones."""
    hits = sum(bool(one.said) for one in active)
    value, low, high = mean_of_shares((hits, len(active)), (right, len(silent)))
    sure = [[one.certainty for one in ones if one.certainty is not None] for ones in (active, silent)]
    return {
        "examples": len(active),
        "value": value,
        "low": low,
        "high": high,
        "f1": 2 * hits / (hits + len(silent) - right + len(active)),
        "auc": auc(np.array(sure[0]), np.array(sure[1])) if all(sure) else None,
    }


def area(active: Sequence[Judgement], silent: Sequence[Judgement], why_not: str) -> dict[str, Any]:
    """The area under the curve with its interval, of the examples with a certainty; null with a reason without."""
    sure = [np.array([one.certainty for one in ones if one.certainty is not None]) for ones in (active, silent)]
    if not all(map(len, sure)):
        return {"value": None, "why": why_not}
    return figure(auc_of, sure[0], sure[1])


def figure(of: Callable[..., Doubles], active: Doubles, silent: Doubles) -> dict[str, Any]:
    """A figure with its bootstrap interval: examples drawn again, active and silent ones apart."""
    rng = np.random.default_rng(0)
    often = []
    for group in (active, silent):
        drawn = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), RESAMPLES)
        often.append(np.concatenate([np.ones((1, len(group))), drawn]))  # the first row: as it is
    values_R = of(active, silent, *often)
    low, high = np.quantile(values_R[1:], ENDS).tolist()
    return {"value": float(values_R[0]), "low": low, "high": high}


def counts(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many examples there were of each kind, and how many had no answer."""
    return {
        "active": sum(one.truth for one in judgements),
        "silent": sum(not one.truth for one in judgements),
        "unread": sum(one.said is None for one in judgements),
        "wrong": sum(one.said is not None and one.said != one.truth for one in judgements),
    }


def unread(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Examples without an answer that could be read: place, why, and whether asking again may help."""
    return [
        {"place": list(one.of.place), "why": one.reason, "again": one.is_endpoints}
        for one in judgements
        if one.said is None
    ]


def judged(judgements: Sequence[Judgement]) -> list[list[Any]]:
    """Every judgement: place, tenth by rank, truth, what was said, how surely; null for what there is not."""
    return [[*one.of.place, one.of.quantile, one.truth, one.said, one.certainty] for one in judgements]


def failed(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """The first examples of which the wrong thing was said, whole, as the explorer shows them."""
    wrong = [one for one in judgements if one.said is not None and one.said != one.truth]
    return [
        {
            "kind": "false negative" if one.truth else "false positive",
            **one.of.record,
        }
        for one in sorted(wrong, key=lambda one: not one.truth)[:MOST_SHOWN]
    ]


def pearson(x: Doubles, y: Doubles) -> float:
    """Correlation; NaN where either is constant."""
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm > 0 else math.nan
