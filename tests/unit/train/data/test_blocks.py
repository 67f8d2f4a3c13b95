"""Training on a store with a window, in one process: what is deleted when, stops while it waits, what is refused."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stage_train.data.blocks
from shared.basics.errors import GranaryError
from shared.basics.metrics_file import read_metrics
from shared.store import Store
from shared.store.capacity import shard_bytes
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens
from tests.training import Died, Runs, assert_same_weights, interrupted_after, watching

pytestmark = pytest.mark.usefixtures("train_configs")

SETTINGS = ("schedule.tokens=null", "schedule.epochs=1", "logger.every=1", "stream.mix_contexts=2")
BLOCKS = 4


def windowed_store(folder: Path, shards: int | None = None) -> Store:
    """Blocks of 2 training shards; the first `shards` shards are there (all)."""
    plan = synthetic_plan(num_contexts=40, seq_len=8, d_model=12, dtype="float32")
    store = Store.create(folder, plan, *synthetic_tokens(plan), 4 * shard_bytes(plan))
    fill(store, range(store.num_shards if shards is None else shards))
    return store


def fill(store: Store, shards: range) -> None:
    for shard in shards:
        store.write_shard(shard, synthetic_shard(store, shard))


@pytest.fixture
def url(tmp_path: Path, train: Runs) -> str:
    return f"store.url={tmp_path / 'windowed'}"


def test_everything_is_read_once_and_deleted(train: Runs, url: str, tmp_path: Path) -> None:
    store = windowed_store(tmp_path / "windowed")
    wanted = int(store.mask(store.contexts("train")).sum())
    out = train("a", url, *SETTINGS)
    lines = read_metrics(out)
    assert lines[-1]["tokens"] == wanted
    assert sorted({line["epoch"] for line in lines}) == list(range(BLOCKS))
    assert store.window is not None
    assert store.window.passed() == BLOCKS
    assert store.window.finished
    assert len(store.contexts("train")) == 0
    assert len(store.contexts("heldout")) == 8
    train("a", url, *SETTINGS)  # a finished run is left alone
    with pytest.raises(GranaryError, match="is being read by the run in"):
        train("b", url, *SETTINGS)
    with pytest.raises(GranaryError, match=r"has passed \(and deleted\) its first 4 blocks"):
        train("a", url, *SETTINGS, "checkpoint.resume=never")


@pytest.mark.parametrize("block", [0, 3])
def test_killed_between_the_checkpoint_and_the_deletion(
    train: Runs,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
) -> None:
    release = Store.release

    def dying(self: Store, number: int) -> None:
        if number == block:
            raise KeyboardInterrupt
        release(self, number)

    store = windowed_store(tmp_path / "windowed")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "release", dying)
        with pytest.raises(KeyboardInterrupt):
            train("a", url, *SETTINGS)
    assert store.window is not None
    assert store.window.passed() == block
    out = train("a", url, *SETTINGS)
    assert store.window.passed() == BLOCKS
    windowed_store(tmp_path / "other")
    assert_same_weights(out, train("b", f"store.url={tmp_path / 'other'}", *SETTINGS))


def test_a_signal_while_it_waits_for_the_harvest(
    train: Runs,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = windowed_store(tmp_path / "windowed", shards=4)
    wait_until = stage_train.data.blocks.wait_until
    sent = []

    def signalled(ready: Callable[[], bool], report: Callable[[], None], give_up: Callable[[], None]) -> float:
        if not ready() and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return wait_until(ready, report, give_up=give_up)

    with monkeypatch.context() as patch:
        patch.setattr("stage_train.data.blocks.wait_until", signalled)
        with pytest.raises(SystemExit) as stopped:
            train("a", url, *SETTINGS)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert store.window is not None
    assert store.window.passed() == 2
    fill(store, range(4, store.num_shards))
    out = train("a", url, *SETTINGS)
    windowed_store(tmp_path / "other")
    assert_same_weights(out, train("b", f"store.url={tmp_path / 'other'}", *SETTINGS))
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in read_metrics(out))


def test_more_than_one_pass_is_refused(train: Runs, url: str, tmp_path: Path) -> None:
    windowed_store(tmp_path / "windowed")
    with pytest.raises(GranaryError, match="can be read once"):
        train("a", url, "schedule.tokens=100000")
    with pytest.raises(GranaryError, match="max_norm_multiple needs the whole store"):
        train("a", url, *SETTINGS, "stream.max_norm_multiple=10")


def test_a_store_that_is_gone_is_harvested_anew_from_where_training_stands(
    train: Runs, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill of both, with the store in memory: blocks that were passed are left out, the weights the same."""
    windowed_store(tmp_path / "windowed")
    with pytest.raises(Died), watching(before=interrupted_after(13)):
        train("a", url, *SETTINGS, "checkpoint.every=3")
    shutil.rmtree(tmp_path / "windowed")
    store = windowed_store(tmp_path / "windowed", shards=2)
    wait_until, made = stage_train.data.blocks.wait_until, []

    def harvesting(ready: Callable[[], bool], report: Callable[[], None], give_up: Callable[[], None]) -> float:
        assert store.window is not None
        for shard in store.pending():
            if shard < store.window.open_end() and not store.window.is_passed(shard, store.heldout_shards):
                made.append(shard)
                fill(store, range(shard, shard + 1))
        return wait_until(ready, report, give_up=give_up)

    monkeypatch.setattr("stage_train.data.blocks.wait_until", harvesting)
    out = train("a", url, *SETTINGS, "checkpoint.every=3")
    windowed_store(tmp_path / "other")
    assert_same_weights(out, train("b", f"store.url={tmp_path / 'other'}", *SETTINGS, "checkpoint.every=3"))
    left_out = set(range(store.num_shards)) - set(store.committed())
    assert left_out.isdisjoint(made)
    assert left_out.isdisjoint(store.heldout_shards)
    assert left_out
