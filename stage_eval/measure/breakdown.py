"""Groups that metrics are broken down by: position in the document, and how common the token is.

Legend: C evaluated contexts, T positions of a context, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BANDS_PER_DECADE = 2
RAREST_EXPONENT = -6

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grouping:
    """Bins 0 .. num_bins - 1; bin i holds values from ``edges[i]`` up to, not including, ``edges[i + 1]``."""

    edges: npt.NDArray[np.float64]

    @property
    def num_bins(self) -> int:
        """Number of bins."""
        return len(self.edges) - 1

    def __call__(self, values: npt.NDArray[np.generic]) -> Ints:
        """Bin of every value, int64, the shape of `values`; values outside fall into the first or last bin."""
        return np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, self.num_bins - 1)


def position_groups(seq_len: int) -> Grouping:
    """Position 0 alone, then two bins per octave up to `seq_len`: early positions change fast, late ones slowly."""
    octaves = np.arange(0, 2 * int(np.ceil(np.log2(max(seq_len, 2)))) + 1) / 2
    starts = np.unique(np.round(2.0**octaves))
    inner = starts[starts < seq_len]
    return Grouping(np.concatenate([[0.0], inner, [float(seq_len)]]))


def frequency_groups() -> Grouping:
    """Relative token frequency, two bins per decade from 1e-6 to 1."""
    exponents = np.arange(RAREST_EXPONENT * BANDS_PER_DECADE, 1) / BANDS_PER_DECADE
    return Grouping(10.0**exponents)


def token_frequencies(tokens_CT: npt.NDArray[np.int32], counted_CT: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Relative frequency [V] of every token id among the counted positions of the evaluated contexts."""
    counts = np.bincount(tokens_CT[counted_CT])
    return counts / max(int(counts.sum()), 1)
