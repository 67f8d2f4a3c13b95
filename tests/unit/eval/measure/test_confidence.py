"""Ratio estimates over contexts and their intervals."""

import math

import numpy as np
import pytest

from stage_eval.measure.confidence import ratio_of_sums, student_t_quantile


def test_a_hand_computed_ratio() -> None:
    # R = 12 / 6 = 2; residuals y - 2x = (0, 1, -1); var = 3/2 * 2/36; t(2) = 4.3027
    estimate = ratio_of_sums(np.array([2.0, 5.0, 5.0]), np.array([1.0, 2.0, 3.0]))
    assert estimate.value == 2
    half = 4.302652729696 * math.sqrt(1.5 * 2 / 36)
    assert estimate.interval == pytest.approx([2 - half, 2 + half], rel=1e-9)


def test_one_context_has_no_interval() -> None:
    estimate = ratio_of_sums(np.array([3.0, 0.0]), np.array([4.0, 0.0]))
    assert estimate.value == 0.75
    assert estimate.interval is None


def test_nothing_to_divide_by_is_not_a_number() -> None:
    assert math.isnan(ratio_of_sums(np.array([1.0, 1.0]), np.array([0.0, 0.0])).value)


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (99, 1.9842)]
)
def test_students_quantiles(degrees: int, exact: float) -> None:
    assert student_t_quantile(degrees) == pytest.approx(exact, rel=2e-3)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        x = rng.uniform(50, 150, 20)
        y = 0.3 * x + rng.normal(0, 5, 20)
        low, high = ratio_of_sums(y, x).interval or (0.0, 0.0)
        covered += low <= 0.3 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)
