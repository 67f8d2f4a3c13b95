"""Batches of whole contexts: a pure function of (data, seed, epoch), at any number of processes, resumed anywhere."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.sae.sites import Sites
from shared.store import DamagedObjectError
from stage_train.data.stream import ContextBatch, ContextOrder, ContextStream, StoreSlice, TrainingData
from stage_train.data.stream.length import stream_length
from tests.examples import examples
from tests.unit.train.data.stream.test_batches import FIRST, HOOKS, SECOND, MemoryStore

T = 6


class DocumentStore(MemoryStore):
    """The same with two documents in each context, the second as long as the context's number says, and padding."""

    isolated = True

    def __init__(self, num_contexts: int, seed: int = 0) -> None:
        super().__init__(num_contexts, T, seed)
        self.mask_ST[:, -1] = False
        self.damaged: int | None = None

    def segments(self, contexts: np.ndarray) -> np.ndarray:
        segments_ST = np.zeros((len(contexts), T), np.int32)
        for row, context in enumerate(contexts):
            segments_ST[row, 1 + context % 4 :] = 3
            segments_ST[row, -1] = -1
        return segments_ST

    def read_context(self, hook: str, context: int, out: torch.Tensor | None = None) -> torch.Tensor:
        if context == self.damaged:
            raise DamagedObjectError("torn", key="c/3")
        return super().read_context(hook, context, out)


def order(contexts: int, seed: int = 0, *, drop_last: bool = False) -> ContextOrder:
    return ContextOrder(batch_size=contexts * T, seq_len=T, seed=seed, drop_last=drop_last)


def streams(store: DocumentStore, by: ContextOrder, world: int, **options: int) -> list[ContextStream]:
    made = [ContextStream(store.data(), HOOKS, by, rank=r, world=world, io_threads=2, **options) for r in range(world)]
    for stream in made:
        stream.stop_at(2, 0)
    return made


def numbers(parts: Sequence[ContextBatch]) -> list[int]:
    """The contexts of a global batch, every one of which is whole and in its own order."""
    found = []
    for part in parts:
        assert len(part.activations[FIRST]) <= part.most_contexts
        torch.testing.assert_close(part.activations[SECOND][..., :2], part.activations[FIRST])
        for context_TD in part.activations[FIRST]:
            assert context_TD[:, 1].tolist() == list(range(T))
            found.append(int(context_TD[0, 0]))
    return found


def take(made: Sequence[ContextStream], batches: int | None = None) -> list[list[int]]:
    found: list[list[int]] = []
    while batches is None or len(found) < batches:
        try:
            parts = [next(stream) for stream in made]
        except StopIteration:
            break
        found.append(numbers(parts))
        assert len({(part.num_tokens, part.most_contexts) for part in parts}) == 1
        assert parts[0].num_tokens == sum(int(part.counts_CT.sum()) for part in parts)
    return found


@settings(max_examples=examples(20))
@given(st.integers(1, 14), st.sampled_from([2, 4, 6]), st.integers(0, 3), st.integers(0, 900), st.booleans())
def test_every_context_once_per_epoch_at_any_world_size(
    contexts: int, size: int, seed: int, prefetch: int, drop_last: bool
) -> None:
    store, by = DocumentStore(contexts, seed), order(size, seed, drop_last=drop_last)
    store.mask_ST[:, 0] = True
    if drop_last and contexts < size:
        return
    (alone,) = streams(store, by, 1, prefetch_bytes=prefetch)
    batches = take([alone])
    half = len(batches) // 2
    for epoch in (batches[:half], batches[half:]):
        seen = Counter(number for batch in epoch for number in batch)
        assert seen <= Counter(range(contexts))
        assert drop_last or seen == Counter(range(contexts))
    several = streams(store, by, 2, prefetch_bytes=prefetch)
    assert take(several) == batches
    [stream.close() for stream in [alone, *several]]


@settings(max_examples=examples(15))
@given(st.integers(0, 8), st.permutations([1, 2, 4]))
def test_resume_anywhere_at_another_world_size(stop: int, worlds: Sequence[int]) -> None:
    store, by = DocumentStore(14), order(4, 1)
    straight = streams(store, by, 1)
    batches = take(straight)
    first, second = streams(store, by, worlds[0]), streams(store, by, worlds[1])
    assert take(first, stop) == batches[:stop]
    for stream in second:
        stream.load_state_dict(first[-1].state_dict())
    assert take(second) == batches[stop:]
    [stream.close() for stream in [*straight, *first, *second]]


def test_epochs_and_seeds_differ() -> None:
    store = DocumentStore(12)
    (one,), (two,) = streams(store, order(3), 1), streams(store, order(3, 1), 1)
    first, second = take([one]), take([two])
    assert first[:4] != first[4:]
    assert first != second
    [stream.close() for stream in (one, two)]


def test_documents_and_mask_go_with_each_context() -> None:
    store = DocumentStore(9)
    (stream,) = streams(store, order(4), 1)
    for batch in stream:
        for number, documents_T, counts_T in zip(numbers([batch]), batch.documents_CT, batch.counts_CT, strict=True):
            second = 1 + number % 4
            assert documents_T.tolist() == [0] * second + [1] * (T - 1 - second) + [-1]
            assert counts_T.tolist() == store.mask_ST[number].tolist()
    store.isolated = False
    (joined,) = streams(store, order(4), 1)
    assert next(joined).documents_CT.tolist() == [[0] * (T - 1) + [-1]] * 4
    [stream.close() for stream in (stream, joined)]


def test_parts_are_whole_contexts_and_what_counts_of_them() -> None:
    (stream,) = streams(DocumentStore(5), order(5), 1)
    batch = next(stream)
    sites = Sites((SECOND,), (FIRST,), "sequence")
    for most, lengths in ((None, [5]), (2 * T + 1, [2, 2, 1]), (1, [1] * 5)):
        parts = batch.parts(sites, most)
        assert [len(x.documents_CT) for x, _ in parts] == lengths  # type: ignore[union-attr]
        y_ND = torch.cat([y_ND for _, y_ND in parts])
        assert torch.equal(y_ND, batch.activations[FIRST][batch.counts_CT])
        for x, y_ND in parts:
            assert torch.equal(x.counted(x.rows_CTD)[:, :2], y_ND)  # type: ignore[union-attr]
            spread = x.spread(y_ND)  # type: ignore[union-attr]
            assert torch.equal(x.counted(spread), y_ND)  # type: ignore[union-attr]
            assert float(spread.abs().sum()) == pytest.approx(float(y_ND.abs().sum()))
    stream.close()


def test_a_damaged_context_is_left_out_alone() -> None:
    store = DocumentStore(6)
    (whole,) = streams(store, order(3), 1)
    batches = take([whole])
    store.damaged = 2
    (stream,) = [ContextStream(store.data(), HOOKS, order(3), skip_damaged=True)]
    stream.stop_at(2, 0)
    tokens = 0
    for contexts in batches:
        batch = next(stream)
        assert numbers([batch]) == [number for number in contexts if number != 2]
        tokens += batch.num_tokens
    assert stream.skipped_tokens == 2 * int(store.mask_ST[2].sum())
    assert tokens == 2 * int(store.mask_ST.sum())
    [stream.close() for stream in (whole, stream)]
    (strict,) = streams(store, order(6), 1)
    with pytest.raises(DamagedObjectError):
        next(strict)
    strict.close()


def test_the_length_counts_what_is_learnt_from() -> None:
    data = DocumentStore(10).data()
    (stream,) = streams(DocumentStore(10), order(4), 1)
    tokens = [batch.num_tokens for batch in stream]
    stream.close()
    for steps in range(1, 6):
        length = stream_length(data, order(4), tokens=sum(tokens[:steps]))
        assert (length.steps, length.tokens, length.end) == (steps, sum(tokens[:steps]), divmod(steps, 3))
    both = stream_length(data, order(4), epochs=2)
    assert (both.steps, both.tokens, both.end) == (6, 2 * data.num_tokens, (2, 0))
    assert stream_length(data, order(4, drop_last=True), epochs=1).steps == 2
    with pytest.raises(GranaryError, match="fewer than one batch of 66"):
        stream_length(data, order(11, drop_last=True), epochs=1)


def test_sizes_that_cut_contexts_are_refused() -> None:
    with pytest.raises(GranaryError, match=r"stream.batch_size=10: .* whole contexts, of 6 positions: give a multiple"):
        ContextOrder(batch_size=10, seq_len=T, seed=0)
    with pytest.raises(GranaryError, match="3 contexts do not divide among 2 processes: give a multiple of 12"):
        streams(DocumentStore(9), order(3), 2)


def test_a_window_is_read_block_after_block() -> None:
    class Blocks:
        firsts = np.array([0, 5, 9])
        done = 1

        def ready(self, block: int) -> bool:
            return block < self.done

        def wait(self, block: int) -> None:
            self.done = max(self.done, block + 1)

    store = DocumentStore(9)
    data = TrainingData([StoreSlice(store, np.arange(9))], Blocks())  # type: ignore[arg-type]
    for skipped in range(5):
        made = [ContextStream(data, HOOKS, order(2), rank=r, world=2, io_threads=1) for r in range(2)]
        state = {**made[0].state_dict(), "epoch": skipped // 3, "batch": skipped % 3}
        for stream in made:
            stream.load_state_dict(state)
        batches = take(made)
        [stream.close() for stream in made]
        if not skipped:
            straight = batches
        assert batches == straight[skipped:]
    first, second = ({number for batch in part for number in batch} for part in (straight[:3], straight[3:]))
    assert (first, second) == (set(range(5)), set(range(5, 9)))
