"""A damaged context that is skipped leaves a hole and nothing else: order, resume and world size see no difference."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.store import DamagedObjectError, Store
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
from stage_train.data.stream.sample import sample_tokens
from tests.examples import examples
from tests.training import Runs

pytestmark = pytest.mark.usefixtures("train_configs")

HOOKS = {"layers.0.resid_post": (2, torch.float32)}
NAME = next(iter(HOOKS))


class TornStore:
    """Rows say (context, position); some contexts are damaged."""

    def __init__(self, contexts: int, seq_len: int, torn: set[int]) -> None:
        self.contexts, self.seq_len, self.torn = contexts, seq_len, torn
        self.mask_ST = np.random.default_rng(contexts).random((contexts, seq_len)) < 0.8

    def mask(self, contexts: np.ndarray) -> np.ndarray:
        return self.mask_ST[contexts]

    def read_context(self, hook: str, context: int, out: Tensor | None = None) -> Tensor:
        assert out is not None
        out.fill_(torch.nan)
        if context in self.torn:
            raise DamagedObjectError(f"shard {context // 3} is damaged", key=str(context // 3), shard=context // 3)
        out[:, 0] = context
        out[:, 1] = torch.arange(self.seq_len)
        return out

    def data(self) -> TrainingData:
        return TrainingData([StoreSlice(self, np.arange(self.contexts))])  # type: ignore[arg-type]


def batches(
    data: TrainingData, order: StreamOrder, world: int = 1, start: dict[str, object] | None = None, stop: int = 10**9
) -> tuple[list[list[tuple[int, int]]], dict[str, object], int]:
    """Global batches, the state after them, tokens skipped."""
    streams = [TokenStream(data, HOOKS, order, rank=r, world=world, skip_damaged=True) for r in range(world)]
    found: list[list[tuple[int, int]]] = []
    for stream in streams:
        stream.stop_at(2, 0)
        if start is not None:
            stream.load_state_dict(start)
    while len(found) < stop:
        parts = [next(stream, None) for stream in streams]
        if parts[0] is None:
            break
        rows = torch.cat([part.activations[NAME] for part in parts if part is not None])
        found.append([(int(a), int(b)) for a, b in rows.tolist()])
    skipped = sum(stream.skipped_tokens for stream in streams)
    [stream.close() for stream in streams]
    return found, streams[0].state_dict(), skipped


@settings(max_examples=examples(25))
@given(
    st.integers(4, 16), st.integers(1, 9), st.integers(1, 30), st.integers(1, 3), st.sets(st.integers(0, 15)), st.data()
)
def test_what_is_skipped_moves_nothing_else(
    contexts: int, seq_len: int, batch_size: int, mix: int, torn: set[int], draw: st.DataObject
) -> None:
    if not TornStore(contexts, seq_len, torn).mask_ST.any():
        return
    order = StreamOrder(batch_size=batch_size, seed=1, lanes=4, mix_contexts=mix)
    whole, _, none = batches(TornStore(contexts, seq_len, set()).data(), order)
    data = TornStore(contexts, seq_len, torn).data()
    expected = [[pair for pair in batch if pair[0] not in torn] for batch in whole]
    found, _, skipped = batches(data, order)
    assert found == expected
    assert none == 0
    assert skipped == sum(map(len, whole)) - sum(map(len, expected))
    lanes = TokenStream(data, HOOKS, order).num_lanes
    worlds = [world for world in (1, 2, 4) if lanes % world == 0]
    assert all(batches(data, order, world)[0] == expected for world in worlds[1:])
    stop = draw.draw(st.integers(0, len(whole)))
    first, state, _ = batches(data, order, draw.draw(st.sampled_from(worlds)), stop=stop)
    rest, _, _ = batches(data, order, draw.draw(st.sampled_from(worlds)), start=state)
    assert first + rest == expected


def test_each_damaged_object_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batches(TornStore(12, 4, {3, 4, 5, 9}).data(), StreamOrder(batch_size=5, seed=0, lanes=2))
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"skipping what cannot be read: shard {shard} is damaged" for shard in (1, 3)
    ]


def test_only_damage_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: TornStore, hook: str, context: int, out: Tensor | None = None) -> Tensor:
        raise GranaryError("cannot read s3://bucket: check the network")

    monkeypatch.setattr(TornStore, "read_context", unreachable)
    with pytest.raises(GranaryError, match="check the network"):
        batches(TornStore(4, 4, set()).data(), StreamOrder(batch_size=5, seed=0))


def test_the_sample_for_the_initialisation_does_without_them() -> None:
    data = TornStore(8, 4, {0, 2, 5}).data()
    with pytest.raises(DamagedObjectError):
        sample_tokens(data, HOOKS, 100, 0)
    rows = sample_tokens(data, HOOKS, 100, 0, skip_damaged=True)[NAME]
    assert {int(context) for context in rows[:, 0].tolist()} == {1, 3, 4, 6, 7}
    with pytest.raises(DamagedObjectError):
        sample_tokens(TornStore(8, 4, set(range(8))).data(), HOOKS, 100, 0, skip_damaged=True)


@pytest.mark.parametrize("fault", ["flipped", "missing", "short"])
def test_a_run_that_stopped_at_damage_goes_on_without_it(
    train: Runs,
    tmp_path: Path,
    fault: str,
) -> None:
    store = Store.open(tmp_path / "store")
    victim = tmp_path / "store" / store.committed()[2].arrays["layers/1/resid_post"].key
    content = bytearray(victim.read_bytes())
    if fault == "missing":
        victim.unlink()
    else:
        content[100] ^= 1
        victim.write_bytes(content if fault == "flipped" else content[:200])
    with pytest.raises(DamagedObjectError, match=r"shard 2 of .* is damaged"):
        train("a", "checkpoint.every=1")
    out = train("a", "checkpoint.every=1", "stream.on_damage=skip", "schedule.tokens=640")
    lines = read_metrics(out)
    assert lines[-1]["tokens"] >= 640
    affected = 1 if fault == "flipped" else 4
    mask = store.mask([8])[0] if fault == "flipped" else store.mask(range(8, 12))
    in_full_epochs = lines[-1]["tokens"] // int(store.mask(store.contexts("train")).sum())
    assert sum(line["skipped_tokens"] for line in lines) >= in_full_epochs * int(mask.sum()) >= affected
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_batches_without_a_single_token_left_are_survived(train: Runs, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    keys = [record.arrays["layers/1/resid_post"].key for shard, record in store.committed().items() if shard != 0]
    for key in keys:
        (tmp_path / "store" / key).unlink()
    out = train("a", "stream.on_damage=skip", "stream.batch_size=4", "stream.lanes=1", "stream.mix_contexts=1")
    lines = read_metrics(out)
    assert all(np.isfinite(json.loads(json.dumps(line))["loss"]) for line in lines)
    assert sum(line["skipped_tokens"] for line in lines) > 0.5 * lines[-1]["tokens"]
