"""The stream over real stores of any shape, and over stores with a window: nothing lost, nothing twice, one order."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.store import Store, WindowPlan
from shared.store.capacity import shard_bytes
from stage_train.data.blocks import WindowReader, windowed
from stage_train.data.stores import pin
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
from stage_train.data.stream.length import stream_length
from tests.examples import examples
from tests.synthetic import synthetic_plan, synthetic_tokens

HOOKS = {"layers.0.resid_post": (2, torch.float32), "layers.1.mlp_out": (3, torch.float32)}
FIRST, SECOND = HOOKS


def labelled_store(folder: Any, **changes: Any) -> Store:
    """Rows of every hook begin with (context, position)."""
    hooks = {hook: width for hook, (width, _) in HOOKS.items()}
    plan = synthetic_plan(hooks=hooks, dtype="float32", **changes)
    store = Store.create(folder, plan, *synthetic_tokens(plan))
    for shard in store.pending():
        contexts = store.shard_contexts(shard)
        rows = torch.zeros(len(contexts), plan.seq_len, 3)
        rows[:, :, 0] = torch.tensor(list(contexts))[:, None]
        rows[:, :, 1] = torch.arange(plan.seq_len)
        store.write_shard(shard, {hook: rows[:, :, :width].contiguous() for hook, width in hooks.items()})
    return store


def trainable(store: Store, contexts: Sequence[int]) -> Counter[tuple[int, int]]:
    mask = store.mask(contexts)
    return Counter((int(contexts[row]), int(position)) for row, position in np.argwhere(mask))


def batches(
    data: TrainingData, order: StreamOrder, world: int, end: tuple[int, int], start: Any = None, count: int = 10**9
) -> tuple[list[list[tuple[int, int]]], Any]:
    """Global batches as (context, position), and the state after them."""
    made = [TokenStream(data, HOOKS, order, rank=rank, world=world, io_threads=2) for rank in range(world)]
    found: list[list[tuple[int, int]]] = []
    for stream in made:
        stream.stop_at(*end)
        if start is not None:
            stream.load_state_dict(start)
    while len(found) < count:
        parts = [next(stream, None) for stream in made]
        if any(part is None for part in parts):
            assert not any(parts)
            break
        rows: dict[str, list[Any]] = {hook: [] for hook in HOOKS}
        for part in parts:
            assert part is not None
            for hook, x_ND in part.activations.items():
                rows[hook] += [(int(a), int(b)) for a, b in x_ND[:, :2].tolist()]
        assert rows[FIRST] == rows[SECOND], "the hooks are not aligned"
        found.append(rows[FIRST])
    for stream in made:
        stream.close()
    return found, made[0].state_dict()


ANY = {
    "num_contexts": st.integers(2, 20),
    "seq_len": st.integers(1, 12),
    "shard_contexts": st.integers(1, 6),
    "chunk_tokens": st.integers(1, 16),
}
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=examples(20), **SLOW)
@given(
    st.fixed_dictionaries(ANY), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40), st.integers(1, 3),
    st.booleans(), st.data(),
)  # fmt: skip
def test_every_trainable_token_once_for_any_store(
    tmp_path_factory: pytest.TempPathFactory,
    shape: dict[str, int],
    lanes: int,
    batch_size: int,
    mix: int,
    held: bool,
    draw: st.DataObject,
) -> None:
    held = held and shape["num_contexts"] > shape["shard_contexts"]
    store = labelled_store(tmp_path_factory.mktemp("any"), heldout_fraction=0.3 if held else 0.0, **shape)
    contexts = store.contexts("train").tolist()
    wanted = trainable(store, contexts)
    if not wanted:
        return
    data = TrainingData([StoreSlice(store, np.array(contexts))])
    order = StreamOrder(batch_size=batch_size, seed=3, lanes=lanes, mix_contexts=mix)
    alone, _ = batches(data, order, 1, (2, 0))
    half = len(alone) // 2
    for epoch in (alone[:half], alone[half:]):
        assert Counter(pair for batch in epoch for pair in batch) == wanted
    num_lanes = TokenStream(data, HOOKS, order).num_lanes
    worlds = [world for world in (2, 4) if num_lanes % world == 0]
    for world in worlds:
        assert batches(data, order, world, (2, 0))[0] == alone
    stop = draw.draw(st.integers(0, len(alone)))
    before, after = draw.draw(st.permutations([1, *worlds]) if worlds else st.just([1, 1]))[:2]
    first, state = batches(data, order, before, (2, 0), count=stop)
    assert first + batches(data, order, after, (2, 0), state)[0] == alone


class Hesitant:
    """Blocks that are ready when chance has it: what a slower or faster harvest does to reading ahead."""

    def __init__(self, reader: WindowReader, seed: int) -> None:
        self.reader, self.chance = reader, np.random.default_rng(seed)

    @property
    def firsts(self) -> np.ndarray:
        return self.reader.firsts

    def ready(self, block: int) -> bool:
        return bool(self.chance.random() < 0.5) and self.reader.ready(block)

    def wait(self, block: int) -> None:
        self.reader.wait(block)


@settings(max_examples=examples(20), **SLOW)
@given(
    st.fixed_dictionaries(ANY), st.integers(2, 8), st.sampled_from([1, 2, 4]), st.integers(1, 40),
    st.integers(0, 9), st.data(),
)  # fmt: skip
def test_a_window_reads_every_token_once_block_after_block_whatever_the_timing(
    tmp_path_factory: pytest.TempPathFactory,
    shape: dict[str, int],
    shards: int,
    lanes: int,
    batch_size: int,
    timing: int,
    draw: st.DataObject,
) -> None:
    store = labelled_store(tmp_path_factory.mktemp("window"), heldout_fraction=0.0, **shape)
    window = WindowPlan.of(store.plan, shards * shard_bytes(store.plan))
    contexts = store.contexts("train").tolist()
    blocks = [[c for shard in window.shards(b) for c in store.shard_contexts(shard)] for b in range(window.num_blocks)]
    if any(not trainable(store, block) for block in blocks):
        return
    reader = WindowReader(store, type("Held", (), {"plan": window})())  # type: ignore[arg-type]
    source = [StoreSlice(store, np.array(contexts))]
    order = StreamOrder(batch_size=batch_size, seed=3, lanes=lanes, mix_contexts=2)
    data = TrainingData(source, reader)
    length = stream_length(data, order, epochs=1)
    found, _ = batches(data, order, 1, length.end)
    assert len(found) == length.steps
    assert length.tokens == data.num_tokens
    per_block = [-(-sum(trainable(store, block).values()) // batch_size) for block in blocks]
    start = 0
    for block, count in zip(blocks, per_block, strict=True):
        part = found[start : start + count]
        assert Counter(pair for batch in part for pair in batch) == trainable(store, block)
        start += count
    assert batches(TrainingData(source, Hesitant(reader, timing)), order, 1, length.end)[0] == found
    num_lanes = TokenStream(data, HOOKS, order).num_lanes
    worlds = [world for world in (1, 2, 4) if num_lanes % world == 0]
    stop = draw.draw(st.integers(0, len(found)))
    before, after = (draw.draw(st.sampled_from(worlds)) for _ in range(2))
    first, state = batches(data, order, before, length.end, count=stop)
    assert first + batches(data, order, after, length.end, state)[0] == found


def test_a_window_is_read_once(tmp_path: Any) -> None:
    data = blocks_of(tmp_path)
    order = StreamOrder(batch_size=8, seed=0, lanes=2)
    with pytest.raises(GranaryError, match=r"has store\.window and can be read once: .* tokens are asked for"):
        stream_length(data, order, tokens=data.num_tokens + 1)
    with pytest.raises(GranaryError, match="can be read once"):
        stream_length(data, order, epochs=2)
    assert stream_length(data, order, tokens=20).steps == 3
    stream = TokenStream(data, HOOKS, order)
    assert sum(batch.num_tokens for batch in stream) == data.num_tokens  # ends by itself
    stream.close()


def blocks_of(folder: Any) -> TrainingData:
    store = labelled_store(folder, heldout_fraction=0.0)
    window = WindowPlan.of(store.plan, 2 * shard_bytes(store.plan))
    reader = WindowReader(store, type("Held", (), {"plan": window})())  # type: ignore[arg-type]
    return TrainingData([StoreSlice(store, store.contexts("train"))], reader)


def test_what_a_window_does_not_allow_is_one_line(tmp_path: Any) -> None:
    plan = synthetic_plan(num_contexts=40)
    store = Store.create(tmp_path / "a", plan, *synthetic_tokens(plan), 4 * shard_bytes(plan))
    world = type("World", (), {"is_main": True, "size": 1, "rank": 0})()
    (part,) = pin([(store.url, 1.0)], world)  # type: ignore[arg-type]
    assert set(part.shards) == set(range(10)) - store.heldout_shards
    (heavy,) = pin([(store.url, 2.0)], world)  # type: ignore[arg-type]
    for parts, multiple, line in (([heavy], None, "read alone, once, with weight 1"), ([part, part], None, "alone"),
                                  ([part], 10.0, "max_norm_multiple needs the whole store")):  # fmt: skip
        with pytest.raises(GranaryError, match=line):
            windowed(parts, multiple)
    reader = windowed([part], None)
    assert reader is not None
    reader.begin("one", "/runs/one", None)
    reader.window.io.put("window/passed/00000000.json", [b"x"])
    with pytest.raises(GranaryError, match=r"has passed \(and deleted\) its first 1 blocks"):
        reader.begin("one", "/runs/one", None)
