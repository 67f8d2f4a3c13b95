"""The window of a store: blocks, the two sides' marks, what a killed process leaves, what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.store import Store, WindowPlan
from shared.store.__main__ import main
from shared.store.capacity import shard_bytes
from shared.store.io.local import LocalIO
from shared.store.verify import drop_incomplete, verify
from shared.store.window import data_keys
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens

HOOK = "layers.2.resid_post"


def windowed_store(folder, shards_in_window=4, **changes):
    plan = synthetic_plan(**{"num_contexts": 40, "seq_len": 16, "d_model": 8, "heldout_placement": "spread", **changes})
    return Store.create(folder, plan, *synthetic_tokens(plan), shards_in_window * shard_bytes(plan))


def fill(store, shards):
    for shard in shards:
        store.write_shard(shard, synthetic_shard(store, shard))


@given(st.integers(2, 60), st.floats(0, 0.9), st.sampled_from(["spread", "last"]), st.integers(2, 30))
def test_blocks_cover_the_store_and_two_of_them_fit(shards, heldout, placement, window_shards):
    plan = synthetic_plan(num_contexts=4 * shards - 1, heldout_fraction=heldout, heldout_placement=placement)
    window = WindowPlan.of(plan, window_shards * shard_bytes(plan))
    assert WindowPlan.from_bytes(window.to_bytes(), "x") == window
    blocks = [window.shards(block) for block in range(window.num_blocks)]
    assert [shard for block in blocks for shard in block] == list(range(plan.num_shards))
    sizes = [len(set(block) - set(plan.heldout_shards)) for block in blocks]
    assert max(sizes) <= window_shards // 2
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_shard_takes_no_more_than_the_window_counts(tmp_path, dtype):
    store = windowed_store(tmp_path, dtype=dtype)
    fill(store, [0])
    record = store.committed()[0]
    assert sum(store.io.size(key) for key in data_keys(record)) == shard_bytes(store.plan)


def test_a_window_that_holds_no_two_shards_is_one_line(tmp_path):
    with pytest.raises(GranaryError, match=r"store\.window of .* bytes is too small: it must hold 2 shards of"):
        windowed_store(tmp_path, shards_in_window=1)


def test_both_sides(tmp_path):
    store = windowed_store(tmp_path)  # 10 shards, 2 held out, blocks of 2 training shards
    window = store.window
    ends = window.plan.ends
    assert len(ends) == 4
    assert window.open_end() == ends[1]
    fill(store, range(ends[1]))
    before = store.statistics(HOOK)
    store.release(0)
    assert window.open_end() == ends[2]
    gone = sorted(set(range(ends[0])) - store.heldout_shards)
    assert sorted(store.passed_shards()) == gone
    assert store.pending() == list(range(ends[1], 10))
    assert not set(store.contexts("train").tolist()) & {c for s in gone for c in store.shard_contexts(s)}
    assert len(store.contexts("heldout")) == 4 * len([s for s in store.heldout_shards if s < ends[1]])
    with pytest.raises(GranaryError, match=rf"shard {gone[0]} of .* is gone: training has passed it"):
        store.read_context(HOOK, 4 * gone[0])
    assert torch.equal(torch.from_numpy(store.statistics(HOOK).mean), torch.from_numpy(before.mean))
    report = verify(store.url)
    assert report.problems == report.leftovers == report.foreign == report.uncommitted == []
    assert report.passed == gone
    for block in (1, 2):
        fill(store, range(ends[block], ends[block + 1]))
        store.release(block)
    store.finalize()
    assert window.open_end() == 10
    assert verify(store.url).intact
    store.release(3)
    assert Store.open(tmp_path).passed_shards() == set(range(10)) - store.heldout_shards


@pytest.mark.parametrize("stop_after", range(6))
def test_a_release_killed_anywhere_is_completed_by_the_next_one(tmp_path, monkeypatch, stop_after):
    store = windowed_store(tmp_path)
    fill(store, range(store.window.plan.ends[1]))
    calls = 0
    put, delete = LocalIO.put, LocalIO.delete

    def dying(original):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls > stop_after:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(LocalIO, "put", dying(put))
        patch.setattr(LocalIO, "delete", dying(delete))
        if stop_after < 4:  # a mark, two deletions, a mark
            with pytest.raises(KeyboardInterrupt):
                store.release(0)
        else:
            store.release(0)
    store = Store.open(tmp_path)
    assert verify(store.url).problems == []  # what is missing is known to be passed
    if stop_after < 4:
        assert store.window.open_end() == store.window.plan.ends[1]  # no room before all is deleted
    store.release(0)
    assert store.window.open_end() == store.window.plan.ends[2]
    assert verify(store.url).leftovers == []


def test_a_shard_that_training_passes_while_it_is_written_leaves_nothing(tmp_path):
    """Whichever comes first, the mark or the commit record: the second of the two sees the first."""
    store = windowed_store(tmp_path)
    store.release(0)  # nothing of the block is there, as when a store is harvested a second time
    (first, *_) = sorted(set(store.window.plan.shards(0)) - store.heldout_shards)
    fill(store, [first])
    assert first in store.committed()
    assert not any(store.io.size(key) for key in data_keys(store.committed()[first]))
    heldout = sorted(store.heldout_shards)[:1]
    fill(store, heldout)
    assert all(store.io.size(key) for key in data_keys(store.committed()[heldout[0]]))


def test_what_a_killed_release_left_can_be_dropped(tmp_path, monkeypatch):
    store = windowed_store(tmp_path)
    fill(store, range(store.window.plan.ends[0]))
    with monkeypatch.context() as patch:
        patch.setattr(LocalIO, "delete", lambda self, key: None)
        store.release(0)
    left = verify(store.url).leftovers
    assert len(left) == 2
    del store
    assert sorted(drop_incomplete(str(tmp_path))) == sorted(left)
    assert verify(str(tmp_path)).leftovers == []


def test_one_reader(tmp_path):
    store = windowed_store(tmp_path)
    store.window.claim("one", "/runs/one")
    store.window.claim("one", "/runs/one")
    with pytest.raises(GranaryError, match=r"is being read by the run in /runs/one: one run can read it"):
        Store.open(tmp_path).window.claim("two", "/runs/two")


def test_another_window_and_an_extension_are_refused(tmp_path):
    store = windowed_store(tmp_path)
    plan = store.plan
    for other in (None, 6 * shard_bytes(plan)):
        with pytest.raises(GranaryError, match=r"was begun with store\.window of .* bytes, not"):
            Store.create(tmp_path, plan, None, None, None, other)
    with pytest.raises(GranaryError, match=r"has store\.window and cannot be extended"):
        Store.append(tmp_path, plan, *synthetic_tokens(plan))
    plain = synthetic_plan()
    Store.create(tmp_path / "plain", plain, *synthetic_tokens(plain))
    with pytest.raises(GranaryError, match=r"store\.window of null, not"):
        Store.create(tmp_path / "plain", plain, None, None, None, 10**9)


def test_the_command_line_shows_what_is_passed(tmp_path, capsys):
    store = windowed_store(tmp_path)
    fill(store, range(store.window.plan.ends[0]))
    store.release(0)
    assert main(["ls", str(tmp_path)]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 0
    assert "4 blocks; 2 shards passed by training" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(tmp_path)]) == 1  # shards are missing: the harvest goes on
    assert "passed by training and deleted" in capsys.readouterr().out


def test_a_flipped_bit_under_window_is_found(tmp_path):
    store = windowed_store(tmp_path)
    fill(store, range(store.window.plan.ends[0]))
    store.window.claim("one", "/runs/one")
    store.release(0)
    store.window.finish()
    for path in sorted((tmp_path / "window").rglob("*.json")):
        data = bytearray(path.read_bytes())
        for position in (0, len(data) // 2, len(data) - 2):
            data[position] ^= 2
            path.write_bytes(data)
            key = str(path.relative_to(tmp_path))
            assert key in [problem.key for problem in verify(str(tmp_path)).problems], key
            data[position] ^= 2
        path.write_bytes(data)
    assert verify(str(tmp_path)).problems == []
