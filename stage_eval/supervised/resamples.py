"""Figures with intervals over documents: the bootstrap of Efron (1979), every figure as a column of its resamples.

A replicate is a float64 vector [1 + R]: a figure as it is, then in each of R resamples of the U test documents, drawn
once for all figures. So the mean, difference or ratio of figures is that of their replicates, intervals included.
Tokens of a document depend on one another, hence documents are drawn, not tokens.
"""

import warnings

import numpy as np
import numpy.typing as npt

from shared.text.documents import Ints, Marks
from stage_eval.measure.confidence import LEVEL
from stage_eval.results.supervised import Ranged

RESAMPLES = 1000

Doubles = npt.NDArray[np.float64]


class Resamples:
    """R draws of documents with replacement."""

    def __init__(self, documents: int, seed: int) -> None:
        draws: npt.NDArray[np.number] = np.full((RESAMPLES, documents), np.nan)  # one document can't differ
        if documents > 1:
            draws = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), RESAMPLES)
        self.often_RU = np.concatenate([np.ones((1, documents)), draws])

    def sums(self, value_N: npt.NDArray[np.generic], document_N: Ints) -> Doubles:
        """Replicates of the sum of a value over tokens."""
        of_document_U = np.bincount(document_N, weights=value_N.astype(np.float64), minlength=self.often_RU.shape[1])
        found: Doubles = self.often_RU @ of_document_U
        return found

    def ratio(self, part_N: npt.NDArray[np.generic], whole_N: npt.NDArray[np.generic], document_N: Ints) -> Doubles:
        """Replicates of a ratio of sums; NaN where the whole is nothing."""
        part, whole = self.sums(part_N, document_N), self.sums(whole_N, document_N)
        return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)

    def balanced(self, says_N: Marks, is_yes_N: Marks, document_N: Ints) -> Doubles:
        """Replicates of the balanced accuracy: the mean of the shares right of both classes; 0.5 is chance."""
        right_yes = self.ratio(says_N & is_yes_N, is_yes_N, document_N)
        right_no = self.ratio(~says_N & ~is_yes_N, ~is_yes_N, document_N)
        return (right_yes + right_no) / 2

    def f1(self, says_N: Marks, is_yes_N: Marks, document_N: Ints) -> Doubles:
        """Replicates of F1 at equal classes, 2 TPR / (1 + TPR + FPR): it depends on no base rate."""
        hits = self.ratio(says_N & is_yes_N, is_yes_N, document_N)
        false = self.ratio(says_N & ~is_yes_N, ~is_yes_N, document_N)
        return 2 * hits / (1 + hits + false)


def mean(columns: list[Doubles]) -> Doubles:
    """Replicates of the mean of figures; a figure is left out of a resample in which it is undefined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing, which is NaN
        found: Doubles = np.nanmean(np.stack(columns), axis=0)
        return found


def ranged(replicates: Doubles) -> Ranged:
    """The figure with its 95 % interval; no interval where resamples can't differ, or half of them are undefined."""
    defined = replicates[1:][np.isfinite(replicates[1:])]
    if not np.isfinite(replicates[0]) or 2 * len(defined) < len(replicates) - 1:
        return Ranged(value=float(replicates[0]), interval=None)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Ranged(value=float(replicates[0]), interval=(low, high))
