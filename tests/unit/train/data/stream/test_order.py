"""The order of the stream: pure functions, checked against definitions written out in full."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from stage_train.data.stream.apportion import Apportionment
from stage_train.data.stream.epoch import EpochPlan, StreamOrder
from stage_train.data.stream.permutation import Purpose, effective_lanes, group_starts, random_order
from tests.examples import examples

lane_tokens = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda counts: sum(counts) > 0)


@given(lane_tokens)
def test_apportionment_is_the_sort_by_virtual_time(counts: list[int]) -> None:
    order = sorted((Fraction(2 * j + 1, 2 * n), lane) for lane, n in enumerate(counts) for j in range(n))
    apportionment = Apportionment(counts)
    taken = [0] * len(counts)
    for position, (_, lane) in enumerate(order):
        assert apportionment.counts_at(position) == taken
        assert apportionment.position_of(lane, taken[lane]) == position
        taken[lane] += 1
    assert apportionment.counts_at(len(order)) == counts


def test_apportionment_is_exact_beyond_64_bits() -> None:
    counts = [3 * 10**17 + i * i for i in range(64)]
    apportionment = Apportionment(counts)
    position = 7 * 10**17 + 1
    at = apportionment.counts_at(position)
    assert sum(at) == position
    last = max((Fraction(2 * (at[i] - 1) + 1, 2 * n), i) for i, n in enumerate(counts))
    first = min((Fraction(2 * at[i] + 1, 2 * n), i) for i, n in enumerate(counts))
    assert last < first


def test_positions_outside_the_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        Apportionment([2, 3]).counts_at(6)


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 70), st.integers(0, 10**6))
def test_random_order_is_a_pure_permutation(n: int, seed: int, epoch: int, lane: int, group: int) -> None:
    order = random_order(n, Purpose.TOKENS, seed, epoch, lane, group)
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, random_order(n, Purpose.TOKENS, seed, epoch, lane, group))


def test_random_order_never_changes() -> None:
    """A stored run must resume to the same batches with any later version: these values are part of the format."""
    assert random_order(8, Purpose.CONTEXTS, 0, 0).tolist() == [0, 5, 7, 4, 2, 6, 3, 1]
    orders = {tuple(random_order(20, purpose, *key)) for purpose in Purpose for key in [(1, 2), (2, 1), (1, 2, 3)]}
    assert len(orders) == 3 * len(Purpose)


@given(st.integers(1, 200), st.integers(1, 200))
def test_every_lane_has_a_context(lanes: int, contexts: int) -> None:
    effective = effective_lanes(lanes, contexts)
    assert 1 <= effective <= min(lanes, contexts)
    assert effective == lanes or 2 * effective + 1 > contexts


def test_no_lanes_is_one_line() -> None:
    with pytest.raises(GranaryError, match=r"stream\.lanes=0"):
        effective_lanes(0, 5)


@given(st.integers(1, 50), st.integers(0, 70), st.integers(1, 9))
def test_groups_cover_a_lane(contexts: int, lane: int, mix: int) -> None:
    starts = group_starts(contexts, lane, mix)
    sizes = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == contexts
    assert (sizes <= mix).all()
    assert (sizes[1:] > 0).all()
    assert sizes[0] == min(1 + lane % mix, contexts)


@settings(max_examples=examples(50))
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=30),
    st.integers(1, 50),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 3),
    st.booleans(),
)
def test_epoch_plan_gives_every_token_once(
    counts: list[int], batch_size: int, lanes: int, mix: int, epoch: int, drop_last: bool
) -> None:
    order = StreamOrder(batch_size=batch_size, seed=3, lanes=lanes, mix_contexts=mix, drop_last=drop_last)
    plan = EpochPlan(np.array(counts), np.arange(len(counts)), order, epoch)
    offsets = [plan.offsets_at(batch) for batch in range(plan.num_batches + 1)]
    sizes = np.diff([sum(o) for o in offsets])
    assert (sizes[:-1] == batch_size).all()
    if drop_last:
        assert (sizes == batch_size).all()
        assert plan.num_tokens - sum(offsets[-1]) < batch_size
    else:
        assert offsets[-1] == [lane.num_tokens for lane in plan.lanes]
    assert sorted(np.concatenate([lane.contexts for lane in plan.lanes]).tolist()) == list(range(len(counts)))
    for lane in plan.lanes:
        for group in range(lane.num_groups):
            batch = plan.first_batch(lane.lane, group)
            start = lane.group_tokens[group]
            before, after = plan.offsets_at(batch)[lane.lane], plan.offsets_at(batch + 1)[lane.lane]
            assert before <= start < after or drop_last
            assert lane.group_of(start) == group
            assert sorted(plan.token_order(lane.lane, group)) == list(range(lane.group_tokens[group + 1] - start))
        assert lane.group_of(lane.num_tokens) == lane.num_groups
