"""What can go wrong with a store, and that none of it passes unseen."""

import errno
import fcntl
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.store import DamagedObjectError, Store
from shared.store.format import extent
from shared.store.io.local import LocalIO
from shared.store.verify import drop_incomplete, verify
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_store, synthetic_tokens

HOOK = "layers.2.resid_post"


def content(folder):
    """Relative path to bytes of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def flip_bit(path, position, bit=3):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "store"
    synthetic_store(folder, synthetic_plan(seq_len=32, d_model=20))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def test_an_untouched_store_is_intact(folder):
    report = verify(str(folder))
    assert report.intact
    assert report.problems == report.missing == report.uncommitted == report.foreign == report.leftovers == []


@pytest.mark.parametrize(("dtype", "codec"), [("bfloat16", "none"), ("int8", "lz4")])
def test_a_flipped_bit_in_any_object_is_found_and_named(tmp_path, dtype, codec):
    folder = tmp_path / "store"
    plan = synthetic_plan(seq_len=32, d_model=20, dtype=dtype, codec=codec, hooks=dict.fromkeys([HOOK], 20))
    synthetic_store(folder, plan)
    kinds = {str(path.relative_to(folder)).split("/c/")[0] for path in folder.rglob("*") if path.is_file()}
    assert {"tokens", "mask", "segments", "layers/2/resid_post", "zarr.json", "_COMPLETE.json"} <= kinds
    assert ("layers/2/resid_post_scale" in kinds) == (dtype == "int8")
    chooser = random.Random(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        original = path.read_bytes()
        key = str(path.relative_to(folder))
        # the last byte lies in the shard index or behind the record's checksum
        for position in {0, len(original) - 1, chooser.randrange(len(original))}:
            flip_bit(path, position, chooser.randrange(8))
            report = verify(str(folder))
            assert [problem.key for problem in report.problems] == [key], f"{key} at byte {position}"
            path.write_bytes(original)
    assert verify(str(folder)).intact


def test_a_reader_stops_at_a_flipped_bit_with_the_shards_name(folder):
    store = Store.open(folder)
    key = "layers/2/resid_post/c/1/0/0"
    flip_bit(folder / key, 2 * 32 * 20 * 2 + 100)  # context 6: two contexts into shard 1
    intact = store.read_context(HOOK, 5)
    with pytest.raises(DamagedObjectError, match=r"shard 1 of .* is damaged: layers/2/resid_post/c/1/0/0") as caught:
        store.read_context(HOOK, 6)
    assert caught.value.shard == 1
    assert caught.value.key == key
    assert torch.equal(store.read_context(HOOK, 5), intact)
    assert store.read_context(HOOK, 6, verify=False).shape == (32, 20)


def test_an_object_replaced_by_a_consistent_other_one_is_seen_by_the_reader(folder, tmp_path):
    # A zombie writer's shard passes its own checksums, but not the commit record's.
    other = synthetic_store(tmp_path / "other", synthetic_plan(seq_len=32, d_model=20), seed=1)
    key = "layers/2/resid_post/c/0/0/0"
    shutil.copy(Path(other.url) / key, folder / key)
    with pytest.raises(DamagedObjectError, match="shard 0"):
        Store.open(folder).read_context(HOOK, 0)


@pytest.mark.parametrize("name", ["tokens", "mask", "segments"])
def test_damaged_tokens_are_seen_by_the_reader(folder, name):
    flip_bit(folder / name / "c/0/0", 5)
    with pytest.raises(DamagedObjectError, match=f"shard 0 .* {name}/c/0/0"):
        getattr(Store.open(folder), name)([0])


def test_a_damaged_commit_record_stops_every_reader(folder):
    flip_bit(folder / "manifest/00000001.json", 40)
    with pytest.raises(DamagedObjectError, match=r"manifest/00000001\.json is damaged"):
        Store.open(folder).contexts("train")


def test_missing_and_short_objects_are_named(folder):
    (folder / "layers/2/resid_post/c/0/0/0").unlink()
    (folder / "manifest/00000002.json").unlink()
    path = folder / "layers/2/resid_post/c/1/0/0"
    os.truncate(path, path.stat().st_size - 1000)
    report = verify(str(folder))
    assert report.missing == [2]
    assert {(problem.shard, problem.key) for problem in report.problems} == {
        (0, "layers/2/resid_post/c/0/0/0"),
        (1, "layers/2/resid_post/c/1/0/0"),
    }
    assert "layers/2/resid_post/c/2/0/0" in report.uncommitted
    store = Store.open(folder)
    with pytest.raises(GranaryError, match="layers/2/resid_post/c/0/0/0 is missing"):
        store.read_context(HOOK, 0)
    with pytest.raises(GranaryError, match="layers/2/resid_post/c/1/0/0 is shorter"):
        store.read_context(HOOK, 7)


@pytest.mark.parametrize(
    "key",
    ["layers/2/resid_post/c/1/0/0", "statistics/layers/2/resid_post/c/0/0/0", "manifest/00000002.json", "tokens/c/1/0",
     "zarr.json", "layers/2/resid_post/zarr.json", "extents/00000000.json", "extents/00000000.tokens.json",
     "_COMPLETE.json"],
)  # fmt: skip
def test_dropping_what_is_damaged_and_harvesting_again_makes_the_same_store(pristine, folder, key):
    flip_bit(folder / key, 3)
    drop_incomplete(str(folder), verify(str(folder)))
    synthetic_store(folder, synthetic_plan(seq_len=32, d_model=20))
    assert content(folder) == content(pristine)


def test_a_finished_store_is_a_pure_function_of_its_input(pristine, tmp_path):
    plan = synthetic_plan(seq_len=32, d_model=20)
    for shard in (1, 2, 0):  # each by another process of the harvest, so to speak
        store = Store.create(tmp_path / "store", plan, *synthetic_tokens(plan))
        store.write_shard(shard, synthetic_shard(store, shard))
    store.finalize()
    store.finalize()
    assert content(tmp_path / "store") == content(pristine)


def test_creating_it_again_with_another_plan_names_the_difference(folder):
    plan = synthetic_plan(seq_len=32, d_model=20, codec="lz4")
    before = content(folder)
    with pytest.raises(GranaryError, match=r"another harvest: codec is none, not lz4; choose another store\.url"):
        Store.create(folder, plan, *synthetic_tokens(plan))
    assert content(folder) == before


def test_other_tokens_under_the_same_plan_are_refused(tmp_path):
    plan = synthetic_plan()
    tokens, mask, segments = synthetic_tokens(plan)
    store = Store.create(tmp_path, plan, tokens, mask, segments)
    (tmp_path / "extents/00000000.tokens.json").unlink()
    with pytest.raises(GranaryError, match="exists with other content"):
        Store.create(tmp_path, plan, tokens + 1, mask, segments)
    np.testing.assert_array_equal(store.tokens([0]), tokens[:1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t, m, s: (t[:9], m, s), "tokens has shape"),
        (lambda t, m, s: (t.astype(np.float32), m, s), "tokens must be integers"),
        (lambda t, m, s: (t.astype(np.int64) + 2**31, m, s), "do not fit int32"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path, change, named):
    plan = synthetic_plan()
    with pytest.raises(GranaryError, match=named):
        Store.create(tmp_path, plan, *change(*synthetic_tokens(plan)))


def test_opening_what_is_no_store_says_so(tmp_path):
    with pytest.raises(GranaryError, match=r"no activation store at .*: make one with python -m stage_harvest"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    for action in (Store.open, lambda url: Store.create(url, synthetic_plan(), *synthetic_tokens(synthetic_plan()))):
        with pytest.raises(GranaryError, match="not a Granary store"):
            action(tmp_path)


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr("shared.store.format.layout.FORMAT_VERSION", 0)
    with pytest.raises(GranaryError, match="format 1, this Granary reads up to 0"):
        Store.open(folder)


@pytest.mark.parametrize("stop_after", range(0, 24, 3))
def test_a_creation_that_died_anywhere_is_completed_by_the_same_call(pristine, tmp_path, monkeypatch, stop_after):
    plan = synthetic_plan(seq_len=32, d_model=20)
    puts = 0
    put = LocalIO.put

    def dying(self, key, parts, *, replace=False):
        nonlocal puts
        puts += 1
        if puts > stop_after:
            raise KeyboardInterrupt
        return put(self, key, parts, replace=replace)

    with monkeypatch.context() as patch:
        patch.setattr(LocalIO, "put", dying)
        with pytest.raises(KeyboardInterrupt):
            synthetic_store(tmp_path / "store", plan)
    if 0 < stop_after < 15:
        with pytest.raises(GranaryError, match="no tokens yet: run its harvest again"):
            Store.open(tmp_path / "store")
    synthetic_store(tmp_path / "store", plan)
    assert content(tmp_path / "store") == content(pristine)


def test_leftovers_of_other_bytes_are_refused_and_droppable(tmp_path):
    plan = synthetic_plan()
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    store.write_shard(0, synthetic_shard(store, 0, seed=1))
    (tmp_path / "manifest/00000000.json").unlink()
    store = Store.open(tmp_path)  # the harvest that made it died before the commit; this one computes other values
    with pytest.raises(GranaryError, match=r"holds other bytes .* drop-incomplete"):
        store.write_shard(0, synthetic_shard(store, 0))
    assert store.pending() == [0, 1, 2]
    dropped = drop_incomplete(str(tmp_path))
    assert sorted(dropped) == ["layers/2/resid_post/c/0/0/0", "statistics/layers/2/resid_post/c/0/0/0"]
    store.write_shard(0, synthetic_shard(store, 0))
    assert store.pending() == [1, 2]


def test_a_second_commit_of_the_same_shard_changes_nothing(folder):
    before = content(folder)
    store = Store.open(folder)
    record = store.write_shard(1, synthetic_shard(store, 1, seed=7))
    assert record.crc == Store.open(folder).committed()[1].crc
    assert content(folder) == before


def test_dropping_is_refused_while_a_harvest_has_the_store_open(tmp_path):
    plan = synthetic_plan()
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    with pytest.raises(GranaryError, match=r"a harvest is writing to .*: stop it first"):
        drop_incomplete(str(tmp_path))
    del store
    assert drop_incomplete(str(tmp_path)) == []


def test_a_file_size_limit_is_one_line_and_loses_nothing(tmp_path):
    plan = synthetic_plan()
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    activations = synthetic_shard(store, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(GranaryError, match=r"exceeds the file size limit of this process \(ulimit -f\)"):
            store.write_shard(0, activations)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.pending() == [0, 1, 2]
    store.write_shard(0, activations)
    assert store.pending() == [1, 2]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    plan = synthetic_plan()
    store = Store.create(tmp_path, plan, *synthetic_tokens(plan))
    real = os.write

    def full(fd, data):
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(GranaryError, match=r"no space left to write .*free some, then run the same command again"):
            store.write_shard(0, synthetic_shard(store, 0))
    assert store.pending() == [0, 1, 2]
    assert store.io.leftovers() == []
    store.write_shard(0, synthetic_shard(store, 0))
    assert store.pending() == [1, 2]


@pytest.mark.slow
def test_a_really_full_file_system_is_one_line_and_loses_nothing(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", mount]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        plan = synthetic_plan(num_contexts=64, seq_len=128, d_model=64)
        store = Store.create(mount / "store", plan, *synthetic_tokens(plan))
        with pytest.raises(GranaryError, match="no space left to write"):
            synthetic_store(mount / "store", plan)
        done = len(store.committed())
        assert 0 < done < 16
        assert verify(store.url).problems == []
        subprocess.run(["mount", "-o", "remount,size=16M", mount], check=True)
        synthetic_store(mount / "store", plan)
        assert verify(store.url).intact
    finally:
        del store
        subprocess.run(["umount", mount], check=True)


BIG = {"num_contexts": 24, "d_model": 512}  # six shards of 0.25 MB
KINDS = [("none", "bfloat16"), ("lz4", "bfloat16"), ("none", "int8")]


@pytest.fixture(scope="module")
def harvest():
    """Start a process that makes a whole store. It comes from a fork server: it starts at once and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.synthetic"])

    def start(folder, codec, dtype):
        process = context.Process(
            target=synthetic_store, args=(folder, synthetic_plan(codec=codec, dtype=dtype, **BIG))
        )
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, harvest):
    """Uninterrupted stores, and how long one takes, by (codec, dtype); made when first asked for."""
    made = {}

    def get(codec, dtype):
        if (codec, dtype) not in made:
            folder = tmp_path_factory.mktemp("finished")
            for name in ("warm-up", "store"):
                started = time.monotonic()
                process = harvest(folder / name, codec, dtype)
                process.join(60)
                assert process.exitcode == 0
            made[codec, dtype] = folder / "store", time.monotonic() - started
        return made[codec, dtype]

    return get


def kill_and_check(folder, harvest, finished, codec, dtype, share):
    """SIGKILL a harvest after a share of its time: nothing is wrong then, and running it again makes the same bytes."""
    reference, seconds = finished(codec, dtype)
    process = harvest(folder, codec, dtype)
    time.sleep(share * seconds)
    process.kill()
    process.join(60)
    if (folder / "extents/00000000.tokens.json").exists():
        assert verify(str(folder)).problems == []
        store, expected = Store.open(folder), Store.open(reference)
        for shard in store.committed():
            for context in store.shard_contexts(shard):
                assert torch.equal(store.read_context(HOOK, context), expected.read_context(HOOK, context))
    process = harvest(folder, codec, dtype)
    process.join(60)
    assert process.exitcode == 0
    assert content(folder) == content(reference)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_sigkill_leaves_no_wrong_shard_and_rerunning_completes_it_byte_for_byte(tmp_path, harvest, finished, share):
    kill_and_check(tmp_path / "store", harvest, finished, "none", "bfloat16", share)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(30))
def test_sigkill_at_random_points(tmp_path, harvest, finished, attempt):
    share = random.Random(attempt).uniform(0, 1.2)
    kill_and_check(tmp_path / "store", harvest, finished, *KINDS[attempt % 3], share)


def test_a_token_object_that_another_process_is_writing_is_waited_for(tmp_path, monkeypatch):
    """Two harvests that begin at once met each other's locks, and both ended."""
    temp = tmp_path / "store/tokens/c/0/.0.tmp"
    temp.parent.mkdir(parents=True)
    plan = synthetic_plan()
    with temp.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(extent, "BUSY_SECONDS", 0.1)
        with pytest.raises(GranaryError, match=r"another process is writing tokens/c/0/0"):
            Store.create(tmp_path / "store", plan, *synthetic_tokens(plan))
        monkeypatch.undo()
        release = threading.Timer(0.3, fcntl.flock, (held, fcntl.LOCK_UN))
        release.start()
        store = Store.create(tmp_path / "store", plan, *synthetic_tokens(plan))
        release.join()
    assert len(store.pending()) == store.num_shards


def test_two_harvests_of_one_store_leave_nothing_wrong_and_one_more_run_completes_it(tmp_path, harvest, finished):
    reference, _ = finished("none", "bfloat16")
    both = [harvest(tmp_path / "store", "none", "bfloat16") for _ in range(2)]
    for process in both:
        process.join(60)
    assert {process.exitcode for process in both} <= {0, 1}  # 1: it met the other one's lock, and said so
    assert verify(str(tmp_path / "store")).problems == []
    harvest(tmp_path / "store", "none", "bfloat16").join(60)
    assert content(tmp_path / "store") == content(reference)
