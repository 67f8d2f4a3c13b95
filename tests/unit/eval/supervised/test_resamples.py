"""Figures of resamples against documents that are drawn and counted one by one."""

import math

import numpy as np
import pytest

from stage_eval.supervised.resamples import RESAMPLES, Resamples, mean, ranged

U = 7
RNG = np.random.default_rng(0)
DOCUMENT = RNG.integers(0, U, 500)
YES = RNG.random(500) < 0.3
SAYS = YES ^ (RNG.random(500) < 0.05 + 0.05 * DOCUMENT)


def by_hand(resamples: Resamples, number: int) -> tuple[float, float]:
    """Balanced accuracy and F1 at equal classes of the tokens of the drawn documents, each as often as it was drawn."""
    often_U = resamples.often_RU[number].astype(int)
    rows = np.concatenate([np.tile(np.flatnonzero(u == DOCUMENT), often) for u, often in enumerate(often_U)])
    yes, says = YES[rows], SAYS[rows]
    hits, false = says[yes].mean(), says[~yes].mean()
    return (hits + 1 - false) / 2, 2 * hits / (1 + hits + false)


def test_every_replicate_is_the_figure_of_the_drawn_documents() -> None:
    resamples = Resamples(U, seed=3)
    assert (resamples.often_RU.sum(1) == U).all()
    assert (resamples.often_RU[0] == 1).all()
    balanced, f1 = resamples.balanced(SAYS, YES, DOCUMENT), resamples.f1(SAYS, YES, DOCUMENT)
    assert len(balanced) == RESAMPLES + 1
    for number in (0, 1, 2, 500, RESAMPLES):
        assert (balanced[number], f1[number]) == pytest.approx(by_hand(resamples, number))


def test_intervals_grow_with_how_documents_differ() -> None:
    resamples = Resamples(U, seed=0)
    found = ranged(resamples.balanced(SAYS, YES, DOCUMENT))
    alike = ranged(resamples.balanced(SAYS, YES, np.arange(500) % U))
    assert found.value == pytest.approx(alike.value)
    assert found.interval is not None
    assert alike.interval is not None
    assert found.interval[0] < found.value < found.interval[1]
    assert np.ptp(found.interval) > 1.5 * np.ptp(alike.interval)


def test_the_same_seed_draws_the_same_documents() -> None:
    assert (Resamples(U, 1).often_RU == Resamples(U, 1).often_RU).all()
    assert (Resamples(U, 1).often_RU != Resamples(U, 2).often_RU).any()


def test_what_is_undefined_has_no_figure_and_what_can_not_differ_no_interval() -> None:
    resamples = Resamples(U, seed=0)
    none = resamples.balanced(SAYS, YES & False, DOCUMENT)
    assert np.isnan(none).all()
    assert (ranged(none).value, ranged(none).interval) == (None, None)
    rare = YES & (DOCUMENT == 0)  # in 64 % of the resamples
    found = ranged(resamples.balanced(SAYS, rare, DOCUMENT))
    assert found.value is not None
    assert math.isfinite(found.value)
    assert found.interval is not None
    half = np.where(np.arange(RESAMPLES + 1) % 3 > 0, np.nan, 0.5)
    assert ranged(half).interval is None
    assert mean([none, resamples.balanced(SAYS, YES, DOCUMENT)])[0] == resamples.balanced(SAYS, YES, DOCUMENT)[0]


def test_one_document_has_no_interval() -> None:
    found = ranged(Resamples(1, 0).balanced(SAYS, YES, DOCUMENT * 0))
    assert found.value is not None
    assert found.interval is None
