"""A rule on documents that had no part in finding it: F1, precision, recall, and where it fails.

At the true base rate: every token of those documents counts, silent ones too. Intervals are those of the bootstrap over
documents (Efron 1979), U of them or groups of them. Two controls stand beside: the rule of another latent, and "any
token", which is always right about firing and says nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stage_inspect.concepts.score import RESAMPLES, f1, interval
from stage_inspect.explain.rules.corpus import Half
from stage_inspect.explain.rules.grammar import Rule
from stage_inspect.scan.pairs import Ints

MOST_UNITS = 256
FAILURES = 4  # of each kind that are kept
BEFORE, AFTER = 15, 8  # tokens shown around a failure


@dataclass(frozen=True)
class Measured:
    """F1 with the ends of its 95 % interval (None with one document alone), precision and recall."""

    value: float
    low: float | None
    high: float | None
    precision: float
    recall: float

    def record(self) -> dict[str, Any]:
        """Return the figures as the notes keep them."""
        return {"value": self.value, "low": self.low, "high": self.high, "precision": self.precision,
                "recall": self.recall}  # fmt: skip


class Scoring:
    """Scores rules on one half."""

    def __init__(self, half: Half, size: int, seed: int = 0) -> None:
        """`size`: of the vocabulary."""
        self.half, self._size = half, size
        self._unit_N = half.document % MOST_UNITS
        self._units = min(MOST_UNITS, len(half.heads))
        again = np.random.default_rng(seed).multinomial(self._units, np.full(self._units, 1 / self._units), RESAMPLES)
        self._weights_RU = np.concatenate([np.ones((1, self._units)), again])
        self._all_U = self._by_unit(np.arange(half.num_tokens))

    def said(self, rule: Rule) -> npt.NDArray[np.bool_]:
        """Say on which tokens [N] a rule holds."""
        return np.asarray(rule.holds(self.half.channels, self.half.labels_NJ, self._size))

    def measure(self, said_N: npt.NDArray[np.bool_], latent: int) -> Measured | None:
        """How well a rule tells where a latent fires; None where it does not fire in these documents."""
        at, _ = self.half.firing(latent)
        return self._measured(self._by_unit(at[said_N[at]]), self._by_unit(np.flatnonzero(said_N)), self._by_unit(at))

    def any_token(self, latent: int) -> Measured | None:
        """The same of the rule that always says yes."""
        fired_U = self._by_unit(self.half.firing(latent)[0])
        return self._measured(fired_U, self._all_U, fired_U)

    def failures(self, said_N: npt.NDArray[np.bool_], latent: int) -> list[dict[str, Any]]:
        """The strongest firing tokens on which the rule is silent, and evenly spaced ones where it speaks in vain."""
        at, value = self.half.firing(latent)
        fires = dict(zip(at.tolist(), value.tolist(), strict=True))
        missed = ~said_N[at]
        strongest = at[missed][np.lexsort((at[missed], -value[missed]))[:FAILURES]]
        vain_N = said_N.copy()
        vain_N[at] = False
        vain = np.flatnonzero(vain_N)
        vain = vain[np.arange(min(FAILURES, len(vain))) * len(vain) // max(1, min(FAILURES, len(vain)))]
        return [
            self._shown(int(one), kind, fires)
            for kind, ones in (("false negative", strongest), ("false positive", vain))
            for one in ones
        ]

    def _shown(self, one: int, kind: str, fires: dict[int, float]) -> dict[str, Any]:
        """A token with those around it that are of its document and follow one another in the store."""
        low, high = max(0, one - BEFORE), min(self.half.num_tokens, one + AFTER + 1)
        near = np.arange(low, high)
        near = near[(self.half.place[near] - self.half.place[one] == near - one)
                    & (self.half.document[near] == self.half.document[one])]  # fmt: skip
        values = [float(f"{fires.get(other, 0.0):.4g}") for other in near.tolist()]
        return {
            "kind": kind,
            "place": int(self.half.place[one]),
            "tokens": self.half.channels["token"][near].tolist(),
            "values": values,
            "peak": one - int(near[0]),
        }

    def _by_unit(self, tokens: Ints) -> npt.NDArray[np.float64]:
        return np.bincount(self._unit_N[tokens], minlength=self._units).astype(np.float64)

    def _measured(self, right_U: Any, said_U: Any, fired_U: Any) -> Measured | None:
        if not fired_U.sum():
            return None
        fired_R = self._weights_RU @ fired_U
        f1_R = f1(self._weights_RU @ right_U, self._weights_RU @ said_U, fired_R)
        # A resample in which the latent never fires says nothing of it.
        low, high = interval(f1_R[1:][fired_R[1:] > 0]) if self._units > 1 else (None, None)
        right, said, fired = float(right_U.sum()), float(said_U.sum()), float(fired_U.sum())
        return Measured(float(f1_R[0]), low, high, right / max(1, said), right / fired)
