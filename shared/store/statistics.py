"""Moments and norms of activations, gathered as they are written and merged over shards.

Shapes: N rows, D = d_model. All figures are over trainable (masked-in) positions and over the values as stored, which
is what training will read. The result does not depend on the number of threads: rows are reduced in blocks, in order,
in float32 within a block and in float64 between blocks (Chan, Golub & LeVeque 1979).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shared.basics.documents import typed, typed_at
from shared.basics.errors import GranaryError

FLOATS = ("total", "total_squared", "maximum", "squared_error")
BLOCK_ROWS = 64  # reduced in float32, so part of the format: 1 MiB of it at d_model 4096
BINS_PER_OCTAVE = 16  # the norm histogram's bins are 4.4 % wide
OUTLIER_RATIO = 10.0  # an outlier dimension is one whose RMS is this many times the median dimension's
MOST_BIN = BINS_PER_OCTAVE * 1000  # beyond, a norm is none that a float can hold
MOST_GROUP = 48  # a context has fewer than 2^48 positions
PERCENTILES = (5, 50, 95, 99)


@dataclass(slots=True, eq=False)
class Moments:
    """Count, mean [D] and sum of squared deviations M2 [D], float64."""

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, d_model: int) -> Self:
        return cls(0, np.zeros(d_model), np.zeros(d_model))

    def merge(self, count: int, mean: npt.NDArray[Any], m2: npt.NDArray[Any]) -> None:
        """Add a second set of rows."""
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta**2 * (self.count * count / total)
        self.count = total


@dataclass(slots=True)
class NormFigures:
    """Euclidean norms of rows, and what storing them cost."""

    count: int = 0
    total: float = 0.0
    total_squared: float = 0.0
    maximum: float = 0.0
    squared_error: float = 0.0
    """Sum of squared differences between the values offered to the store and those it holds."""
    histogram: Counter[int] = field(default_factory=Counter)
    """floor(16 log2 norm) to number of rows; rows of norm 0 under a bin below all others."""
    by_position: dict[int, Counter[int]] = field(default_factory=dict)
    """Position group to such a histogram. Group g > 0 has positions 2^(g-1) to 2^g - 1, group 0 has position 0."""

    def add(self, squared_norms: npt.NDArray[np.float64], positions: npt.NDArray[np.int64] | None = None) -> None:
        """Count rows with these squared norms, at these positions of their contexts where they are known."""
        norms = np.sqrt(squared_norms)
        self.count += len(norms)
        self.total += float(norms.sum())
        self.total_squared += float(squared_norms.sum())
        self.maximum = max(self.maximum, float(norms.max(initial=0.0)))
        bins = np.floor(BINS_PER_OCTAVE * np.log2(np.maximum(norms, 2.0**-150))).astype(np.int64)
        if positions is None:
            self.histogram.update(count_bins(bins))
            return
        groups = np.frexp(positions.astype(np.float64))[1].astype(np.int64)  # the number of bits
        parts: dict[int, dict[int, int]] = {}
        for both, count in count_bins(groups * (4 * MOST_BIN) + bins + MOST_BIN).items():  # one sort for all groups
            group, shifted = divmod(both, 4 * MOST_BIN)
            parts.setdefault(group, {})[shifted - MOST_BIN] = count
        for group, part in parts.items():
            self.histogram.update(part)
            self.by_position.setdefault(group, Counter()).update(part)

    def merge(self, other: "NormFigures") -> None:
        """Add a second set of rows."""
        self.count += other.count
        self.total += other.total
        self.total_squared += other.total_squared
        self.maximum = max(self.maximum, other.maximum)
        self.squared_error += other.squared_error
        self.histogram.update(other.histogram)
        for group, histogram in other.by_position.items():
            self.by_position.setdefault(group, Counter()).update(histogram)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "total": self.total,
            "total_squared": self.total_squared,
            "maximum": self.maximum,
            "squared_error": self.squared_error,
            "histogram": sorted(map(list, self.histogram.items())),
            "by_position": [[g, sorted(map(list, self.by_position[g].items()))] for g in sorted(self.by_position)],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any], where: str = "norms") -> Self:
        """Inverse of `to_json`; raises GranaryError for a value of another type."""
        given = {"by_position": [], **typed(dict[str, Any], record, where)}
        groups = typed_at(given, "by_position", list[tuple[int, list[Any]]], where)
        if not all(0 <= group <= MOST_GROUP for group, _ in groups):
            raise GranaryError(f"{where} has norms at positions that no context has")
        return cls(
            count=typed_at(given, "count", int, where),
            **{name: typed_at(given, name, float, where) for name in FLOATS},
            histogram=counter_of(given.get("histogram"), where),
            by_position={group: counter_of(bins, where) for group, bins in groups},
        )

    def quantile(self, q: float) -> float:
        """Norm below which a share `q` of the rows lies, to within half a histogram bin (2.2 %); nan without rows."""
        return min(histogram_quantile(self.histogram, q), self.maximum)


def counter_of(bins: Any, where: str) -> Counter[int]:
    """Pairs of bin and count as a counter; raises GranaryError for anything else. Quick, as a store has many."""
    try:
        found = dict(bins)
    except (TypeError, ValueError):
        found = {"": ""}
    is_plain = {*map(type, found), *map(type, found.values())} <= {int}
    if not is_plain or any(abs(bin_) > MOST_BIN or count < 1 for bin_, count in found.items()):
        raise GranaryError(f"{where} has a histogram that is no list of pairs of bin and count")
    return Counter(found)


def count_bins(bins: npt.NDArray[np.int64]) -> dict[int, int]:
    """Bin to number of times it occurs."""
    values, counts = np.unique(bins, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def histogram_quantile(histogram: Counter[int], q: float) -> float:
    """Norm below which a share `q` of the rows lies, to within half a bin (2.2 %); nan without rows."""
    wanted, seen = q * histogram.total(), 0
    for bin_, count in sorted(histogram.items()):
        if seen + count >= wanted:
            return 2.0 ** ((bin_ + max(wanted - seen, 0.0) / count) / BINS_PER_OCTAVE)
        seen += count
    return math.nan


@dataclass(slots=True, eq=False)
class RowStatistics:
    """Moments and norms of the same rows."""

    moments: Moments
    norms: NormFigures

    @classmethod
    def empty(cls, d_model: int) -> Self:
        return cls(Moments.empty(d_model), NormFigures())

    def add_block(
        self, parts: Iterable[npt.NDArray[np.float32]], chosen_N: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64] | None:
        """Add the moments of the chosen ones of at most a block of rows; returns their squared norms, for `norms.add`.

        The rows [N, D] come dealt to H parts [N, D/H]: part h holds dimensions h, h + H, h + 2 H ... (H is 1 for plain
        rows). Each part is changed, and all may be made in the same memory one after the other.
        None, and nothing added, where a chosen row is not finite.
        """
        n = int(chosen_N.sum())
        if n == 0:
            return np.empty(0)
        left_out = np.flatnonzero(~chosen_N)
        squared = np.zeros(len(chosen_N))
        mean_D, m2_D = np.empty((2, len(self.moments.mean)))
        for h, x_NE in enumerate(parts):
            H = mean_D.size // x_NE.shape[1]
            x_NE[left_out] = 0  # cheaper than a copy without them
            with np.errstate(over="ignore", invalid="ignore"):  # looked at below
                squared_here = np.vecdot(x_NE, x_NE)
            if not np.isfinite(squared_here).all():
                if not np.isfinite(x_NE).all():
                    return None
                squared_here = np.einsum("ne,ne->n", x_NE, x_NE, dtype=np.float64)  # the square is not in float32
            squared += squared_here
            mean_E = x_NE.sum(axis=0) / np.float32(n)
            np.subtract(x_NE, mean_E, out=x_NE)
            x_NE[left_out] = 0
            mean_D[h::H] = mean_E
            m2_D[h::H] = np.einsum("ne,ne->e", x_NE, x_NE)
        self.moments.merge(n, mean_D, m2_D)
        return squared[chosen_N]

    def merge(self, other: "RowStatistics") -> None:
        """Add a second set of rows."""
        self.moments.merge(other.moments.count, other.moments.mean, other.moments.m2)
        self.norms.merge(other.norms)


@dataclass(frozen=True, slots=True)
class PositionNorms:
    """Norms of the rows at positions `first` to `last` of their contexts."""

    first: int
    last: int
    count: int
    percentiles: dict[int, float]
    """Percent, one of `PERCENTILES`, to the norm below which so many rows lie, to within 2.2 %."""

    @classmethod
    def from_histogram(cls, group: int, histogram: Counter[int]) -> Self:
        first = 0 if group == 0 else 2 ** (group - 1)
        last = 0 if group == 0 else 2**group - 1
        percentiles = {percent: histogram_quantile(histogram, percent / 100) for percent in PERCENTILES}
        return cls(first, last, histogram.total(), percentiles)


@dataclass(frozen=True, slots=True, eq=False)
class HookStatistics:
    """Figures of one hook over the trainable positions of a set of shards."""

    count: int
    """Rows."""
    mean: npt.NDArray[np.float64]
    """Per-dimension mean, [D]."""
    var: npt.NDArray[np.float64]
    """Per-dimension population variance, [D]."""
    mean_norm: float
    rms_norm: float
    median_norm: float
    """The norm that half of the rows stay below, to within 2.2 %: it comes from a histogram."""
    max_norm: float
    relative_squared_error: float
    """What the storage type cost: squared error over total variance; 0 where values were stored as they came."""
    norms_by_position: tuple[PositionNorms, ...] = ()
    """Along the context, in groups that double in length; those without rows are left out."""

    @classmethod
    def from_rows(cls, rows: RowStatistics) -> Self:
        count = rows.norms.count
        variance = float(rows.moments.m2.sum())
        return cls(
            count=count,
            mean=rows.moments.mean,
            var=rows.moments.m2 / max(count, 1),
            mean_norm=rows.norms.total / count if count else math.nan,
            rms_norm=math.sqrt(rows.norms.total_squared / count) if count else math.nan,
            median_norm=rows.norms.quantile(0.5),
            max_norm=rows.norms.maximum,
            relative_squared_error=rows.norms.squared_error / variance if variance > 0 else 0.0,
            norms_by_position=tuple(
                PositionNorms.from_histogram(group, histogram)
                for group, histogram in sorted(rows.norms.by_position.items())
            ),
        )

    def outlier_dimensions(self) -> list[tuple[int, float]]:
        """Dimensions whose RMS is at least `OUTLIER_RATIO` times the median's, with that ratio, largest first.

        Language models have a few (Kovaleva et al. 2021, "BERT Busters: Outlier Dimensions that Disrupt Transformers").
        A massive activation is something else: a single value, far above all others (Sun et al. 2024).
        """
        rms_D = np.sqrt(self.mean**2 + self.var)
        median = float(np.median(rms_D))
        if median == 0:
            return []
        ratio_D = rms_D / median
        largest = np.argsort(-ratio_D, kind="stable")[: int((ratio_D >= OUTLIER_RATIO).sum())]
        return [(int(dimension), float(ratio_D[dimension])) for dimension in largest]

    def summary(self) -> dict[str, float]:
        """The scalars, as JSON."""
        names = ("count", "mean_norm", "rms_norm", "median_norm", "max_norm", "relative_squared_error")
        return {name: getattr(self, name) for name in names if not math.isnan(getattr(self, name))}


def merge_rows(parts: Iterable[RowStatistics], d_model: int) -> RowStatistics:
    """All parts together, merged in the order given."""
    merged = RowStatistics.empty(d_model)
    for part in parts:
        merged.merge(part)
    return merged
