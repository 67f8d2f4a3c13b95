"""What can go wrong with a store, and that none of it passes unseen."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import GranaryError
from shared.store import DamagedObjectError, Store
from shared.store.objectio import LocalIO
from shared.store.synthetic import synthetic_plan, synthetic_shard, synthetic_store, synthetic_tokens
from shared.store.verify import drop_incomplete, verify

REPOSITORY = Path(__file__).resolve().parents[2]
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


def test_a_flipped_bit_in_any_object_is_found_and_named(folder):
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
    flip_bit(folder / key, 2 * 32 * 20 * 2)  # context 6: two contexts into shard 1
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
    with pytest.raises(DamagedObjectError, match="manifest/00000001.json is damaged"):
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
    with pytest.raises(GranaryError, match="another harvest: codec is none, not lz4; choose another store.url"):
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
    with pytest.raises(GranaryError, match="no activation store at .*: run stage_harvest first"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    for action in (Store.open, lambda url: Store.create(url, synthetic_plan(), *synthetic_tokens(synthetic_plan()))):
        with pytest.raises(GranaryError, match="not a Granary store"):
            action(tmp_path)


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr("shared.store.layout.FORMAT_VERSION", 0)
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

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalIO, "put", dying)
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
    with pytest.raises(GranaryError, match="a harvest is writing to .*: stop it first"):
        drop_incomplete(str(tmp_path))
    del store
    assert drop_incomplete(str(tmp_path)) == []


FILE_LIMIT = """
import resource, sys
from shared.errors import GranaryError
from shared.store.synthetic import *
from shared.store import Store
plan = synthetic_plan(seq_len=32, d_model=200, shard_contexts=4)
store = Store.create(sys.argv[1], plan, *synthetic_tokens(plan))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    store.write_shard(0, synthetic_shard(store, 0))
except GranaryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
assert store.pending() == [0, 1, 2], "nothing committed"
store.write_shard(0, synthetic_shard(store, 0))
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


def test_a_file_size_limit_is_one_line_and_loses_nothing(tmp_path):
    done = run(FILE_LIMIT, tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert "exceeds the file size limit of this process (ulimit -f)" in done.stdout
    assert Store.open(tmp_path / "store").pending() == [1, 2]


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
        with pytest.raises(GranaryError, match="no space left to write .*free some, then run the same command again"):
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
            for shard in store.pending():
                store.write_shard(shard, synthetic_shard(store, shard))
        done = len(store.committed())
        assert 0 < done < 16
        assert verify(store.url).problems == []
        subprocess.run(["mount", "-o", "remount,size=16M", mount], check=True)
        synthetic_store(mount / "store", plan)
        assert verify(store.url).intact
    finally:
        del store
        subprocess.run(["umount", mount], check=True)


KILLED = """
import sys
from shared.store.synthetic import *
plan = synthetic_plan(num_contexts=24, seq_len=64, d_model=512, shard_contexts=4, codec=sys.argv[2], dtype=sys.argv[3])
print("started", flush=True)
synthetic_store(sys.argv[1], plan)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted stores by (codec, dtype), made when first asked for."""
    made = {}

    def get(codec, dtype):
        if (codec, dtype) not in made:
            folder = tmp_path_factory.mktemp("finished") / "store"
            started = time.monotonic()
            assert run(KILLED, folder, codec, dtype).returncode == 0
            made[codec, dtype] = folder, time.monotonic() - started
        return made[codec, dtype]

    return get


def kill_after(folder, codec, dtype, delay):
    """Run a harvest of six shards and SIGKILL it `delay` seconds after its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), codec, dtype], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    with process:
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)


def check_killed(folder, reference, codec, dtype):
    """What a killed harvest left is never wrong, and running it again completes it to the same bytes."""
    if (folder / "extents/00000000.tokens.json").exists():
        assert verify(str(folder)).problems == []
        store = Store.open(folder)
        expected = Store.open(reference)
        for shard in store.committed():
            for context in store.shard_contexts(shard):
                assert torch.equal(store.read_context(HOOK, context), expected.read_context(HOOK, context))
    assert run(KILLED, folder, codec, dtype).returncode == 0
    assert content(folder) == content(reference)


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_sigkill_leaves_no_wrong_shard_and_rerunning_completes_it_byte_for_byte(tmp_path, finished, share):
    reference, seconds = finished("none", "bfloat16")
    kill_after(tmp_path / "store", "none", "bfloat16", share * seconds * 0.5)
    check_killed(tmp_path / "store", reference, "none", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(24))
def test_sigkill_at_random_points(tmp_path, finished, attempt):
    codec, dtype = [("none", "bfloat16"), ("lz4", "bfloat16"), ("none", "int8")][attempt % 3]
    reference, seconds = finished(codec, dtype)
    delay = random.Random(attempt).uniform(0, 0.6 * seconds)
    kill_after(tmp_path / "store", codec, dtype, delay)
    check_killed(tmp_path / "store", reference, codec, dtype)


def test_two_harvests_of_one_store_end_in_one_right_store(tmp_path, finished):
    reference, _ = finished("none", "bfloat16")
    folder = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, str(folder), "none", "bfloat16"]
    both = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outcomes = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    for stderr, returncode in outcomes:
        assert returncode == 0 or "another process is writing" in stderr.splitlines()[-1]
    if not any(returncode == 0 for _, returncode in outcomes):
        assert run(KILLED, folder, "none", "bfloat16").returncode == 0
    assert content(folder) == content(reference)
