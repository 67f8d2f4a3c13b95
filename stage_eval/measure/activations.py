"""What the activations of a site are like: norms along positions, and dimensions far larger than the rest.

Gathered from the evaluated tokens in the same pass as the reconstruction. BOS positions are kept apart: in LLaMA models
they carry the massive activations (Sun et al. 2024), a few dimensions thousands of times larger than the others.

Legend: N tokens, D d_model, G position groups (the last row is BOS), B norm bins.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.kernels import add_at
from shared.store import HookStatistics
from stage_eval.measure.breakdown import Grouping
from stage_eval.measure.sums import Sums
from stage_eval.results.figures import (
    ActivationFigures,
    BosNorm,
    LargeDimension,
    LargestDimensions,
    MassiveDimension,
    NormGroups,
    Spectrum,
    StoreNorms,
)

BINS_PER_OCTAVE = 16  # a bin is 4.4 % wide
LEAST_EXPONENT, GREATEST_EXPONENT = -32, 32
NUM_BINS = (GREATEST_EXPONENT - LEAST_EXPONENT) * BINS_PER_OCTAVE
PERCENTILES = (5, 50, 95, 99)
LARGEST_DIMENSIONS = 8
SPECTRUM_POINTS = 200
"""Ranks that a spectrum is thinned to: a drawable number."""
MASSIVE_RATIO = 100.0
"""A dimension reaches massively far where its largest magnitude is this many times the median dimension's RMS."""


class ActivationSums(Sums):
    """Histograms of token norms by position group and, by dimension, squares and largest magnitudes."""

    def __init__(self, d_model: int, positions: int, device: torch.device) -> None:
        super().__init__()
        self.added = {
            "norm_bins_GB": torch.zeros(positions + 1, NUM_BINS, dtype=torch.int64, device=device),
            "square_D": torch.zeros(d_model, dtype=torch.float64, device=device),
        }
        self.maxed = {
            "norm_G": torch.zeros(positions + 1, dtype=torch.float64, device=device),
            "magnitude_D": torch.zeros(d_model, dtype=torch.float64, device=device),
            "bos_magnitude_D": torch.zeros(d_model, dtype=torch.float64, device=device),
        }

    def add(self, x_ND: Tensor, position_N: Tensor) -> None:
        """Add N evaluated tokens of the given position groups."""
        x_ND = x_ND.double()
        self._add_norms(x_ND.norm(dim=1), position_N)
        self.added["square_D"] += x_ND.square().sum(0)
        raise_to(self.maxed["magnitude_D"], x_ND)

    def add_bos(self, x_ND: Tensor) -> None:
        """Add BOS positions, which no other figure contains."""
        x_ND = x_ND.double()
        last = len(self.maxed["norm_G"]) - 1
        self._add_norms(x_ND.norm(dim=1), torch.full((len(x_ND),), last, device=x_ND.device))
        raise_to(self.maxed["bos_magnitude_D"], x_ND)

    def _add_norms(self, norm_N: Tensor, group_N: Tensor) -> None:
        exponent_N = norm_N.clamp_min(2.0**LEAST_EXPONENT).log2()
        bin_N = ((exponent_N - LEAST_EXPONENT) * BINS_PER_OCTAVE).long().clamp_max(NUM_BINS - 1)
        bins = self.added["norm_bins_GB"]
        add_at(bins.view(-1), group_N * NUM_BINS + bin_N, torch.ones_like(bin_N))
        self.maxed["norm_G"].scatter_reduce_(0, group_N, norm_N, "amax")


def raise_to(greatest_D: Tensor, x_ND: Tensor) -> None:
    """Take the largest magnitudes into `greatest_D`."""
    if len(x_ND):
        torch.maximum(greatest_D, x_ND.abs().amax(0), out=greatest_D)


def activation_figures(sums: ActivationSums, statistics: HookStatistics, positions: Grouping) -> ActivationFigures:
    """What the store knows of a site's training tokens, and what was found on the evaluated ones."""
    std_D = np.sort(np.sqrt(statistics.var))[::-1]
    mean_D = np.sort(np.abs(statistics.mean))[::-1]
    ranks = np.unique(np.geomspace(1, len(std_D), min(SPECTRUM_POINTS, len(std_D))).round().astype(int))
    variance = float(statistics.var.sum())
    return ActivationFigures(
        count=statistics.count,
        mean_norm=statistics.mean_norm,
        rms_norm=statistics.rms_norm,
        median_norm=statistics.median_norm,
        max_norm=statistics.max_norm,
        relative_squared_error=statistics.relative_squared_error,
        norm_of_mean=float(np.linalg.norm(statistics.mean)),
        total_variance=variance,
        variance_in_largest=float(statistics.var.max()) / variance if variance else None,
        massive_dimensions=[
            MassiveDimension(dimension=dimension, rms_ratio=ratio)
            for dimension, ratio in statistics.outlier_dimensions()
        ],
        store_norm_by_position=[
            StoreNorms(
                first=group.first,
                last=group.last,
                tokens=group.count,
                **{f"p{percent}": value for percent, value in group.percentiles.items()},
            )
            for group in statistics.norms_by_position
        ],
        spectrum=Spectrum(rank=ranks.tolist(), std=std_D[ranks - 1].tolist(), abs_mean=mean_D[ranks - 1].tolist()),
        norm_by_position=norm_groups(sums, positions),
        bos_norm=bos_norm(sums),
        largest=largest_dimensions(sums),
    )


def norm_groups(sums: ActivationSums, positions: Grouping) -> NormGroups:
    """Norm percentiles by position group."""
    bins_GB = sums.added["norm_bins_GB"].numpy()[:-1]
    greatest_G = sums.maxed["norm_G"].numpy()[:-1]

    def percentile(percent: int) -> list[float | None]:
        column = [norm_quantile(bins_B, percent / 100) for bins_B in bins_GB]
        return [min(value, most) for value, most in zip(column, greatest_G, strict=True)]

    return NormGroups(
        edges=positions.edges.tolist(),
        tokens=bins_GB.sum(1).tolist(),
        **{f"p{percent}": percentile(percent) for percent in PERCENTILES},
        max=greatest_G.tolist(),
    )


def bos_norm(sums: ActivationSums) -> BosNorm | None:
    """Norms at BOS positions; None where there are none."""
    bins_B = sums.added["norm_bins_GB"].numpy()[-1]
    if not bins_B.any():
        return None
    return BosNorm(tokens=int(bins_B.sum()), p50=norm_quantile(bins_B, 0.5), max=float(sums.maxed["norm_G"][-1]))


def norm_quantile(bins_B: npt.NDArray[np.int64], q: float) -> float:
    """Norm below which a share `q` lies, to within half a bin (2.2 %); NaN without tokens."""
    total = int(bins_B.sum())
    if total == 0:
        return math.nan
    before = np.concatenate([[0], np.cumsum(bins_B)])
    place = int(np.searchsorted(before, q * total, side="left"))
    place = min(max(place, 1), NUM_BINS)
    inside = (q * total - before[place - 1]) / max(int(bins_B[place - 1]), 1)
    return float(2.0 ** (LEAST_EXPONENT + (place - 1 + min(max(inside, 0.0), 1.0)) / BINS_PER_OCTAVE))


def largest_dimensions(sums: ActivationSums) -> LargestDimensions:
    """The dimensions of the largest magnitude, against the RMS of the median dimension."""
    num_tokens = int(sums.added["norm_bins_GB"][:-1].sum())
    square_D = sums.added["square_D"]
    rms_D = (square_D / max(num_tokens, 1)).sqrt()
    typical = float(rms_D.median())
    magnitude_D = torch.maximum(sums.maxed["magnitude_D"], sums.maxed["bos_magnitude_D"])
    energy = float(square_D.sum())
    top = magnitude_D.topk(min(LARGEST_DIMENSIONS, len(magnitude_D))).indices.tolist()
    return LargestDimensions(
        median_rms=typical,
        massive=int((magnitude_D > MASSIVE_RATIO * typical).sum()) if typical > 0 else None,
        massive_ratio=MASSIVE_RATIO,
        dimensions=[
            LargeDimension(
                dimension=dimension,
                max=float(sums.maxed["magnitude_D"][dimension]),
                max_bos=float(sums.maxed["bos_magnitude_D"][dimension]),
                rms=float(rms_D[dimension]),
                energy_share=float(square_D[dimension]) / energy if energy else 0.0,
            )
            for dimension in top
        ],
    )
