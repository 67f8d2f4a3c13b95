"""Point estimates and 95 % confidence intervals of ratios of sums, with the context as the sampling unit.

Tokens of one context are far from independent, so intervals over tokens would be too narrow. Every metric here is a
ratio R = sum_i y_i / sum_i x_i over contexts i (a mean per token has x_i = number of tokens), and its variance is
that of the classical ratio estimator (Cochran, Sampling Techniques, 1977, section 6.3):

    var(R) = n / (n - 1) * sum_i (y_i - R x_i)^2 / (sum_i x_i)^2
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LEVEL = 0.95

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio of sums and its 95 % interval; the interval is None for fewer than two contexts."""

    value: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, the form eval.json holds."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def complement(self) -> "Estimate":
        """The estimate of one minus this ratio."""
        low = None if self.high is None else 1 - self.high
        high = None if self.low is None else 1 - self.low
        return Estimate(1 - self.value, low, high)


def ratio_of_sums(numerators_C: Vector, denominators_C: Vector) -> Estimate:
    """Estimate sum(numerators) / sum(denominators) over contexts; both are float64 [C].

    Contexts with neither numerator nor denominator (no evaluated token) are left out of the count. The value is NaN
    when the denominators sum to 0: such a ratio is undefined, and 0 or 1 would look like a result.
    """
    present = (numerators_C != 0) | (denominators_C != 0)
    y, x = numerators_C[present], denominators_C[present]
    total = float(x.sum())
    if total == 0.0:
        return Estimate(math.nan, None, None)
    value = float(y.sum()) / total
    count = len(x)
    if count < 2:
        return Estimate(value, None, None)
    residuals = y - value * x
    variance = count / (count - 1) * float(residuals @ residuals) / total**2
    half_width = student_t_quantile(count - 1) * math.sqrt(variance)
    return Estimate(value, value - half_width, value + half_width)


def student_t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 0.2 %.

    The Cornish-Fisher expansion of Abramowitz and Stegun 26.7.5; a held-out share of a small store can be a handful of
    contexts, where the normal quantile 1.96 would be far too small.
    """
    p = 0.5 + LEVEL / 2
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / degrees**power for power, term in enumerate(terms)))
