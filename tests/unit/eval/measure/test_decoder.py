"""Nearest neighbours among decoder directions, and the random baseline."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stage_eval.measure.decoder import decoder_figures, random_nearest


def test_repeated_directions_are_found() -> None:
    directions = F.normalize(torch.randn(300, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    directions[100:200] = directions[:100]
    structure = decoder_figures(directions * 3, directions, seed=0)
    assert structure.duplicates == pytest.approx(200 / 300)
    assert structure.sampled == 300
    assert structure.encoder_cosine_mean == pytest.approx(1)
    assert sum(structure.nearest) == pytest.approx(1)


def test_orthogonal_directions_have_no_near_neighbour() -> None:
    structure = decoder_figures(torch.eye(16), -torch.eye(16), seed=0)
    assert structure.nearest_median == 0
    assert structure.encoder_cosine_mean == -1


@pytest.mark.parametrize(("count", "width"), [(400, 8), (2000, 64)])
def test_the_baseline_is_what_random_directions_do(count: int, width: int) -> None:
    directions = F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(1)), dim=1)
    cosines = directions @ directions.T - 2 * torch.eye(count)
    edges = np.linspace(0, 1, 41)
    observed = np.histogram(cosines.max(1).values.numpy(), bins=edges)[0] / count
    expected = np.array(random_nearest(edges, count, width))
    assert expected.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(observed - expected).sum() < 0.25
    middle = (edges[1:] + edges[:-1]) / 2
    assert (observed * middle).sum() == pytest.approx((expected * middle).sum(), rel=0.02)
