"""Figures of judgements against plain definitions, and intervals that hold the truth as often as they say."""

import itertools
import math

import numpy as np
import pytest

from shared.latents.examples import Example
from stage_inspect.explain import examples
from stage_inspect.explain.endpoint.request import Token
from stage_inspect.explain.scores.measure import (
    Judgement,
    auc,
    auc_of,
    classified,
    f1_of,
    figure,
    mean_of_shares,
    pearson,
    wilson,
)
from stage_inspect.explain.scores.yes_or_no import certainty, listed_numbers


def judgements(active: list[int | None], silent: list[int | None]) -> list[Judgement]:
    nothing = np.zeros(1)
    example = Example(nothing.astype(np.int32), nothing.astype(np.float32), 0, 0.0, 0, 0, 0, 0)
    return [
        Judgement(truth, None if said is None else bool(said), examples.Tested(example, truth, 0 if truth else None))
        for truth, ones in ((True, active), (False, silent))
        for said in ones
    ]


def test_wilson_is_the_published_interval() -> None:
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0) == (0, 1)
    assert wilson(5, 5)[1] == 1


def test_balanced_accuracy_and_f1_by_their_definitions() -> None:
    result = classified(judgements([1, 1, 1, 0], [0, 1, 0, 0, 0, 0, None]), "none")
    assert result.value == pytest.approx((3 / 4 + 5 / 6) / 2)
    assert result.details["f1"]["value"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert result.details["counts"] == {"active": 4, "silent": 7, "unread": 1, "wrong": 2}
    assert [one["kind"] for one in result.details["failed"]] == ["false negative", "false positive"]


def test_no_answer_of_one_kind_is_no_score() -> None:
    assert classified(judgements([None, None], [0, 0]), "none").value is None
    assert classified(judgements([1], [None]), "none").value is None


def test_auc_counts_ties_by_half() -> None:
    active, silent = np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.1, 0.5, 0.2])
    wins = [1.0 if a > s else 0.5 if a == s else 0.0 for a, s in itertools.product(active, silent)]
    assert auc(active, silent) == pytest.approx(sum(wins) / len(wins))
    twice = auc_of(active, silent, np.array([[2.0, 0, 1, 1]]), np.array([[1.0, 0, 2]]))
    assert twice[0] == pytest.approx(auc(np.array([0.1, 0.1, 0.5, 0.9]), np.array([0.1, 0.2, 0.2])))
    assert figure(f1_of, np.zeros(3), np.zeros(3)) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_interval_of_balanced_accuracy_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        hits, right = int(rng.binomial(20, 0.5)), int(rng.binomial(20, 0.5))
        _, low, high = mean_of_shares((hits, 20), (right, 20))
        held += low <= 0.5 <= high
    assert 0.93 <= held / 1000 <= 0.985


def test_pearson_of_a_constant_is_no_number() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert pearson(x, 3 * x + 1) == pytest.approx(1)
    assert math.isnan(pearson(x, np.zeros(3)))


def test_certainty_is_read_at_the_numbers_of_the_list() -> None:
    half = math.log(0.5)
    tokens = [Token("1", 0.0, {}), Token(" texts: [", 0.0, {})]
    tokens += [
        Token("1", half, {"1": half, " 0": math.log(0.25)}),
        Token(",", 0.0, {}),
        Token(" 0", half, {" 0": half}),
    ]
    assert certainty(tokens, [1, 0]) == pytest.approx([2 / 3, 0.0])
    assert certainty(tokens, [0, 0]) is None
    assert certainty([Token("1, 0", 0.0, {})], [1, 0]) is None
    assert listed_numbers("[1, 0]\nin short [1,0]", 2, 1) == [1, 0]
