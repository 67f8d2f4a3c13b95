"""The store on a real S3 server: same bytes, nothing replaced, nothing lost when the server dies."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.store import DamagedObjectError, Store
from shared.store.io.base import ObjectMissingError
from shared.store.io.local import LocalIO
from shared.store.io.open import open_io
from shared.store.io.remote import RANGE_BYTES
from shared.store.verify import drop_incomplete, verify
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_store, synthetic_tokens

pytestmark = [
    pytest.mark.s3,
    # s3fs hands its whole body to aiohttp at once; Python shows this kind of warning to nobody by default
    pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning"),
]
HOOK = "layers.2.resid_post"


def everything(io):
    return {key: io.get(key) for key in io.listing()}


def test_objects_behave_as_files_do(url):
    io = open_io(url)
    assert io.put("a/b/c", [b"hello ", memoryview(b"world")])
    assert io.get("a/b/c") == b"hello world"
    assert not io.put("a/b/c", [b"other"])
    assert io.get("a/b/c") == b"hello world"
    assert io.put("a/b/c", [b"other"], replace=True)
    assert io.size("a/b/c") == 5
    assert io.size("a/b") is None
    assert io.listing() == {"a/b/c": 5}
    assert io.listing("a/b") == {"a/b/c": 5}
    assert io.listing("nothing") == {}
    with pytest.raises(ObjectMissingError, match="nothing is missing from s3://"):
        io.get("nothing")
    with pytest.raises(ObjectMissingError, match="nothing is missing from s3://"):
        io.read_into("nothing", 0, [memoryview(bytearray(1))])
    for offset in (3, 5, 50):
        with pytest.raises(GranaryError, match="a/b/c is shorter than its commit record says"):
            io.read_into("a/b/c", offset, [memoryview(bytearray(3))])
    io.delete("a/b/c")
    io.delete("a/b/c")
    assert io.listing() == {}


def test_a_put_that_races_another_never_replaces_it(url):
    clients = [open_io(url) for _ in range(8)]
    for client in clients:
        client.size = lambda key: None  # all of them looked before the first one wrote
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda n: clients[n].put("x", [str(n).encode()]), range(8)))
    assert sum(stored) == 1
    assert clients[0].get("x") == str(stored.index(True)).encode()


def test_large_ranges_travel_in_pieces(url):
    io = open_io(url)
    data = torch.randint(0, 256, (2 * RANGE_BYTES + 12_345,), dtype=torch.uint8).numpy().tobytes()
    io.put("big", [data])
    buffers = [bytearray(RANGE_BYTES - 7), bytearray(4), bytearray(RANGE_BYTES), bytearray(4), bytearray(1000)]
    io.read_into("big", 11, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data[11 : 11 + sum(map(len, buffers))]


@pytest.mark.parametrize(("dtype", "codec"), [("bfloat16", "none"), ("int8", "lz4")])
def test_a_store_has_the_bytes_it_has_on_disk(url, tmp_path, dtype, codec):
    hooks = {f"layers.{layer}.resid_post": 130 for layer in range(3)}
    plan = synthetic_plan(dtype=dtype, codec=codec, hooks=hooks)
    store = synthetic_store(url, plan)
    local = synthetic_store(tmp_path, plan)
    assert everything(store.io) == everything(LocalIO(str(tmp_path)))
    store = Store.open(url)
    assert store.complete
    for context in range(10):
        assert torch.equal(store.read_context(HOOK, context), local.read_context(HOOK, context))
    report = verify(url)
    assert report.intact
    assert report.num_bytes > 0


def test_damage_is_found_and_mended(url):
    plan = synthetic_plan()
    store = synthetic_store(url, plan)
    key = "layers/2/resid_post/c/1/0/0"
    data = bytearray(store.io.get(key))
    data[100] ^= 4
    store.io.put(key, [data], replace=True)
    with pytest.raises(DamagedObjectError, match="shard 1"):
        store.read_context(HOOK, 4)
    report = verify(url)
    assert {problem.shard for problem in report.problems} == {1}
    drop_incomplete(url, report)
    assert verify(url).missing == [1]
    synthetic_store(url, plan)
    assert verify(url).intact


def test_wrong_credentials_and_missing_buckets_are_one_line(server, bucket, monkeypatch):
    with pytest.raises(GranaryError, match=r"no such bucket"):
        open_io("s3://no-such-bucket-here/store").put("x", [b"1"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(GranaryError, match=r"check the credentials \(AWS_ACCESS_KEY_ID"):
        open_io(f"s3://{bucket}/store").get("x")


def test_a_server_that_stays_away_is_one_line(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GRANARY_RETRY_SECONDS", "1")
    with pytest.raises(GranaryError, match=r"cannot read .*check the network and AWS_ENDPOINT_URL"):
        open_io(f"s3://{bucket}/store").get("x")


def test_a_server_killed_in_mid_write_loses_nothing_and_duplicates_nothing(server, url, tmp_path):
    plan = synthetic_plan(num_contexts=24, seq_len=256, d_model=512)
    store = Store.create(url, plan, *synthetic_tokens(plan))
    harvest = threading.Thread(target=synthetic_store, args=(url, plan))
    harvest.start()
    while len(store.committed()) < 2:
        time.sleep(0.01)
    server.kill()
    time.sleep(1)
    assert harvest.is_alive(), "the server died after the last shard: nothing was tested"
    server.start()
    harvest.join(120)
    assert not harvest.is_alive()
    synthetic_store(tmp_path, plan)
    assert everything(open_io(url)) == everything(LocalIO(str(tmp_path)))


def test_a_server_killed_in_mid_read_is_waited_for(server, url):
    plan = synthetic_plan(num_contexts=16, seq_len=1024, d_model=1024)
    store = synthetic_store(url, plan)
    expected = [synthetic_shard(store, shard)[HOOK].bfloat16() for shard in range(4)]
    rounds, stop = 0, threading.Event()

    def outage():
        time.sleep(0.3)
        server.kill()
        time.sleep(1)
        server.start()
        stop.set()

    with ThreadPoolExecutor(5) as pool:
        dying = pool.submit(outage)
        while not stop.is_set() or rounds == 0:
            for context, found in enumerate(pool.map(lambda c: store.read_context(HOOK, c), range(16))):
                assert torch.equal(found, expected[context // 4][context % 4])
            rounds += 1
        dying.result()
