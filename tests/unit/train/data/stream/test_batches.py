"""The stream over a store in memory: coverage, independence of the number of processes, resume, read-ahead, faults."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.basics.errors import GranaryError
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
from tests.examples import examples

HOOKS = {"layers.0.resid_post": (2, torch.float32), "layers.1.resid_post": (3, torch.bfloat16)}
FIRST, SECOND = HOOKS


class MemoryStore:
    """Activations whose first two columns are (context, position), so that every row says where it came from."""

    def __init__(self, num_contexts: int, seq_len: int, seed: int = 0, density: float = 0.7) -> None:
        self.seq_len = seq_len
        self.mask_ST = np.random.default_rng(seed).random((num_contexts, seq_len)) < density
        self.reads: list[int] = []
        self.torn: int | None = None
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    def mask(self, contexts: np.ndarray) -> np.ndarray:
        return self.mask_ST[contexts]

    def read_context(self, hook: str, context: int, out: Tensor | None = None) -> Tensor:
        assert out is not None
        with self._lock:
            self.reads.append(context)
        if context == self.torn:
            raise GranaryError(f"shard 3 is torn: {hook} context {context}")
        out[:, 0] = context
        out[:, 1] = torch.arange(self.seq_len)
        if out.shape[1] > 2:
            out[:, 2] = 1
        return out

    def data(self) -> TrainingData:
        return TrainingData([StoreSlice(self, np.arange(len(self.mask_ST)))])  # type: ignore[arg-type]

    def trainable(self) -> Counter[tuple[int, int]]:
        return Counter((int(s), int(t)) for s, t in np.argwhere(self.mask_ST))


def pairs(rows: Tensor) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in rows[:, :2].tolist()]


def take(streams: Sequence[TokenStream], batches: int | None = None) -> list[list[tuple[int, int]]]:
    """Global batches: the ranks' rows in rank order; until the streams stop, or a number of them."""
    out: list[list[tuple[int, int]]] = []
    while batches is None or len(out) < batches:
        try:
            parts = [next(stream) for stream in streams]
        except StopIteration:
            break
        rows = [pair for part in parts for pair in pairs(part.activations[FIRST])]
        assert all(part.num_tokens == len(rows) for part in parts)
        for part in parts:
            torch.testing.assert_close(part.activations[SECOND][:, :2], part.activations[FIRST])
        out.append(rows)
    return out


def streams(data: TrainingData, order: StreamOrder, world: int, **options: int) -> list[TokenStream]:
    made = [TokenStream(data, HOOKS, order, rank=r, world=world, io_threads=2, **options) for r in range(world)]
    for stream in made:
        stream.stop_at(2, 0)
    return made


shapes = st.tuples(st.integers(1, 24), st.integers(1, 12))


@settings(max_examples=examples(40))
@given(
    shapes,
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 900),
)
def test_every_token_once_per_epoch_at_any_world_size(
    shape: tuple[int, int], batch_size: int, lanes: int, mix: int, seed: int, prefetch: int
) -> None:
    store = MemoryStore(*shape, seed=seed)
    if not store.mask_ST.any():
        return
    data = store.data()
    order = StreamOrder(batch_size=batch_size, seed=seed, lanes=lanes, mix_contexts=mix)
    alone = streams(data, order, 1, prefetch_bytes=prefetch)
    batches = take(alone)
    per_epoch = alone[0].plan(0).num_batches
    assert len(batches) == 2 * per_epoch
    for epoch in (0, 1):
        of_epoch = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(pair for batch in of_epoch for pair in batch) == store.trainable()
        assert all(len(batch) == batch_size for batch in of_epoch[:-1])
    for world in (2, 4):
        if alone[0].plan(0).num_lanes % world == 0:
            several = streams(data, order, world, prefetch_bytes=prefetch)
            assert take(several) == batches
            [stream.close() for stream in several]
    alone[0].close()


@settings(max_examples=examples(25))
@given(st.data(), st.integers(1, 30), st.integers(1, 4), st.booleans())
def test_resume_anywhere_at_another_world_size(draw: st.DataObject, batch_size: int, mix: int, drop_last: bool) -> None:
    data = MemoryStore(13, 9, density=0.9).data()
    order = StreamOrder(batch_size=batch_size, seed=1, lanes=4, mix_contexts=mix, drop_last=drop_last)
    straight = streams(data, order, 1)[0]
    batches = take([straight])
    stop = draw.draw(st.integers(0, len(batches)))
    before, after = draw.draw(st.permutations([1, 2, 4]))[:2]
    first = streams(data, order, before)
    assert take(first, stop) == batches[:stop]
    state = first[-1].state_dict()
    second = streams(data, order, after)
    for stream in second:
        stream.load_state_dict(state)
    assert take(second) == batches[stop:]
    [stream.close() for stream in [straight, *first, *second]]


def test_loading_a_state_after_reading_drops_what_was_read() -> None:
    data = MemoryStore(12, 8).data()
    stream = streams(data, StreamOrder(batch_size=5, seed=0, lanes=4, mix_contexts=2), 1)[0]
    start = stream.state_dict()
    batches = take([stream], 7)
    stream.load_state_dict(start)
    assert take([stream], 7) == batches
    stream.close()


def test_a_state_of_another_order_or_store_is_refused() -> None:
    data = MemoryStore(12, 8).data()
    order = StreamOrder(batch_size=5, seed=0)
    state = TokenStream(data, HOOKS, order).state_dict()
    with pytest.raises(GranaryError, match=r"order .*'seed': 0.*'seed': 1"):
        TokenStream(data, HOOKS, StreamOrder(batch_size=5, seed=1)).load_state_dict(state)
    with pytest.raises(GranaryError, match="tokens"):
        TokenStream(MemoryStore(12, 8, seed=4).data(), HOOKS, order).load_state_dict(state)


def test_epochs_and_seeds_differ() -> None:
    data = MemoryStore(8, 8).data()
    stream = streams(data, StreamOrder(batch_size=1000, seed=0), 1)[0]
    first, second = take([stream])
    other = take(streams(data, StreamOrder(batch_size=1000, seed=1), 1))[0]
    assert first != second
    assert first != other
    assert sorted(first) == sorted(second) == sorted(other)


def test_memory_and_reads_are_bounded() -> None:
    """Each context is read once per epoch, and the budget for reading ahead is kept."""
    store = MemoryStore(64, 16, density=1.0)
    order = StreamOrder(batch_size=32, seed=0, lanes=8, mix_contexts=3)
    context_bytes = 16 * (2 * 4 + 3 * 2)
    stream = TokenStream(store.data(), HOOKS, order, prefetch_bytes=5 * context_bytes)
    assert stream.buffer_bytes == (8 * 3 + 5) * context_bytes
    stream.stop_at(1, 0)
    next(stream)
    stream.close()
    assert len(set(store.reads)) <= 8 * 3 + 5
    store.reads.clear()
    stream = TokenStream(store.data(), HOOKS, order, prefetch_bytes=0)
    stream.stop_at(1, 0)
    take([stream])
    assert Counter(store.reads) == dict.fromkeys(range(64), 2)  # two hooks
    stream.close()


def test_stopping_early_reads_no_more_than_needed() -> None:
    store = MemoryStore(64, 16, density=1.0)
    stream = TokenStream(store.data(), HOOKS, StreamOrder(batch_size=8, seed=0, lanes=8, mix_contexts=2))
    stream.stop_at(0, 1)
    assert len(take([stream])) == 1
    stream.close()
    assert len(set(store.reads)) == sum(1 + lane % 2 for lane in range(8))


def test_refills_do_not_come_all_at_once() -> None:
    """With staggered groups no single batch makes most lanes read; without, all would at the same batch."""
    store = MemoryStore(256, 16, density=1.0)
    order = StreamOrder(batch_size=64, seed=0, lanes=16, mix_contexts=4)
    plan = TokenStream(store.data(), HOOKS, order).plan(0)
    refills = Counter(plan.first_batch(lane.lane, group) for lane in plan.lanes for group in range(1, lane.num_groups))
    assert max(refills.values()) <= 16 // 4 + 1


def test_a_torn_shard_is_named_when_its_tokens_are_needed() -> None:
    store = MemoryStore(16, 8, density=1.0)
    store.torn = 11
    stream = TokenStream(store.data(), HOOKS, StreamOrder(batch_size=4, seed=0, lanes=4, mix_contexts=1))
    seen: list[list[tuple[int, int]]] = []

    def consume() -> None:
        for _ in range(32):
            seen.extend(take([stream], 1))

    with pytest.raises(GranaryError, match="shard 3 is torn"):
        consume()
    stream.close()
    assert seen
    assert all(context != 11 for batch in seen for context, _ in batch)


def test_lanes_that_do_not_divide_are_one_line() -> None:
    data = MemoryStore(20, 8).data()
    with pytest.raises(GranaryError, match=r"16 lanes \(halved from 64 .* do not divide among 3 processes"):
        TokenStream(data, HOOKS, StreamOrder(batch_size=4, seed=0), world=3)


def test_a_store_smaller_than_one_full_batch_is_one_line() -> None:
    data = MemoryStore(2, 4, density=1.0).data()
    stream = TokenStream(data, HOOKS, StreamOrder(batch_size=9, seed=0, drop_last=True))
    with pytest.raises(GranaryError, match="fewer than one batch of 9"):
        next(stream)
    with pytest.raises(GranaryError, match="no committed token"):
        MemoryStore(2, 4, density=0.0).data()
    with pytest.raises(GranaryError, match=r"stream\.batch_size=0"):
        StreamOrder(batch_size=0, seed=0)


def test_several_stores_with_weights() -> None:
    one, two, three = (MemoryStore(n, 6, seed=n, density=1.0) for n in (4, 6, 10))
    sources = [StoreSlice(s, np.arange(len(s.mask_ST)), w) for s, w in ((one, 2.0), (two, 1.0), (three, 0.5))]  # type: ignore[arg-type]
    data = TrainingData(sources)
    stream = streams(data, StreamOrder(batch_size=7, seed=0, lanes=4), 1)[0]
    assert stream.plan(0).num_tokens == 6 * (2 * 4 + 6 + 5)
    take([stream])
    stream.close()
    assert Counter(one.reads) == dict.fromkeys(range(4), 2 * 2 * 2)  # twice per epoch, two epochs, two hooks
    assert Counter(two.reads) == dict.fromkeys(range(6), 2 * 2)
    assert sum(Counter(three.reads).values()) == 5 * 2 * 2
    halves = [set(data.rows_of_epoch(0, epoch)[14:]) for epoch in range(2)]
    assert halves[0] != halves[1]
    assert all(data.locate(row)[0].store is three for half in halves for row in half)


def test_stores_of_different_length_are_refused() -> None:
    sources = [StoreSlice(MemoryStore(2, t), np.arange(2)) for t in (4, 8)]  # type: ignore[arg-type]
    with pytest.raises(GranaryError, match=r"different context lengths \[4, 8\]"):
        TrainingData(sources)


def test_waiting_is_measured() -> None:
    store = MemoryStore(8, 4)
    hold: Future[None] = Future()
    read = store.read_context

    def slow(hook: str, context: int, out: Tensor | None = None) -> Tensor:
        hold.result(timeout=10)
        return read(hook, context, out)

    store.read_context = slow  # type: ignore[method-assign]
    stream = TokenStream(store.data(), HOOKS, StreamOrder(batch_size=4, seed=0, lanes=2))
    timer = threading.Timer(0.2, hold.set_result, [None])
    timer.start()
    next(stream)
    timer.join()
    stream.close()
    assert stream.wait_seconds >= 0.15
