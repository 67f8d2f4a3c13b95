"""Norm percentiles and large dimensions, against numpy on the values themselves."""

import numpy as np
import pytest
import torch

from stage_eval.measure.activations import (
    ActivationSums,
    bos_norm,
    largest_dimensions,
    norm_groups,
    norm_quantile,
)
from stage_eval.measure.breakdown import Grouping


def test_percentiles_are_those_of_the_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 10, generator=generator) * torch.rand(6000, 1, generator=generator) * 50
    groups = torch.arange(6000) % 3
    sums = ActivationSums(10, 3, torch.device("cpu"))
    for part in range(0, 6000, 1000):  # in parts, and one of them by another rank
        sums.add(x[part : part + 1000], groups[part : part + 1000])
    found = norm_groups(sums, Grouping(np.arange(4.0)))
    norms = x.double().norm(dim=1).numpy()
    for group in range(3):
        here = norms[groups.numpy() == group]
        assert found.tokens[group] == len(here)
        for percentile in (5, 50, 95, 99):
            assert getattr(found, f"p{percentile}")[group] == pytest.approx(np.percentile(here, percentile), rel=0.05)
        assert found.max[group] == pytest.approx(here.max(), rel=1e-12)


def test_parts_of_two_ranks_merge_to_the_whole() -> None:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    groups = torch.zeros(40, dtype=torch.int64)
    whole, one, other = (ActivationSums(4, 1, torch.device("cpu")) for _ in range(3))
    whole.add(x, groups)
    one.add(x[:25], groups[:25])
    other.add(x[25:], groups[25:])
    one.merge(other)
    assert torch.equal(one.added["norm_bins_GB"], whole.added["norm_bins_GB"])
    assert torch.equal(one.maxed["magnitude_D"], whole.maxed["magnitude_D"])


def test_massive_dimensions_are_found_and_bos_is_apart() -> None:
    x = torch.ones(20, 6)
    x[3, 4] = -250
    bos = torch.ones(2, 6)
    bos[0, 1] = 900
    sums = ActivationSums(6, 1, torch.device("cpu"))
    sums.add(x, torch.zeros(20, dtype=torch.int64))
    sums.add_bos(bos)
    largest = largest_dimensions(sums)
    assert largest.median_rms == 1
    assert largest.massive == 2
    first, second = largest.dimensions[:2]
    assert (first.dimension, first.max, first.max_bos) == (1, 1, 900)
    assert (second.dimension, second.max, second.max_bos) == (4, 250, 1)
    assert bos_norm(sums).tokens == 2
    assert norm_groups(sums, Grouping(np.arange(2.0))).tokens == [20]


def test_no_tokens_have_no_percentile() -> None:
    assert np.isnan(norm_quantile(np.zeros(1024, np.int64), 0.5))
    sums = ActivationSums(3, 2, torch.device("cpu"))
    sums.add_bos(torch.zeros(0, 3))
    assert bos_norm(sums) is None
    assert norm_groups(sums, Grouping(np.arange(3.0))).p50 == [None, None]
