"""Harvest, training, verify and evaluation on s3:// through the command lines, the server dying in between."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shared.sae import SAE
from shared.store import Store
from shared.store.io.local import LocalIO
from shared.store.io.open import open_io
from shared.store.verify import verify
from stage_train.data.stream import StoreSlice, StreamOrder, TokenStream, TrainingData
from tests.cli import ForkServer
from tests.harvesting import Harvester
from tests.synthetic import synthetic_plan, synthetic_store

pytestmark = [
    pytest.mark.s3,
    pytest.mark.filterwarnings("ignore:Sending a large body directly with raw bytes:ResourceWarning"),
]
HOOK = "layers.2.resid_post"
SETTINGS: dict[str, object] = {"store__shard_contexts": 1, "store__heldout_fraction": 0.2}


@pytest.fixture(scope="module")
def harvester(server: object, stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    folder = tmp_path_factory.mktemp("s3")
    return Harvester(folder, stages.at(folder))


@pytest.fixture(scope="module")
def local(harvester: Harvester) -> Store:
    return harvester.harvest("local", **SETTINGS)


def everything(io):
    return {key: io.get(key) for key in io.listing()}


def on_s3(harvester: Harvester, url: str, **changes: object) -> list[str]:
    arguments = harvester.arguments(**SETTINGS, **changes)
    return [f"store.url={url}" if argument.startswith("store.url=") else argument for argument in arguments]


def test_every_stage_by_command(harvester: Harvester, local: Store, bucket: str, tmp_path: Path) -> None:
    def stage(module: str, *arguments: str, status: int = 0) -> str:
        done = harvester.server.run(module, *arguments)
        assert done.code == status, done.stderr
        return done.stdout + done.stderr

    url = f"s3://{bucket}/stages/store"
    stage("stage_harvest", *on_s3(harvester, url))
    assert everything(open_io(url)) == everything(LocalIO(local.url))
    assert "0 damaged, 0 of" in stage("shared.store", "verify", url)
    assert "committed" in stage("shared.store", "ls", url)
    fixed = ["sae.k=3", "sae.expansion=4", "stream.batch_size=16", "schedule.tokens=300", "logger.progress=false"]
    for name, where in (("remote", url), ("local", local.url)):
        folder = tmp_path / name
        stage("stage_train", f"run_dir={folder}", f"out_dir={folder}/sae", f"store.url={where}", *fixed)
    remote, here = (SAE.from_pretrained(tmp_path / name / "sae").state_dict() for name in ("remote", "local"))
    assert all(torch.equal(tensor, here[name]) for name, tensor in remote.items())
    evaluation = [f"run_dir={tmp_path}/remote", f"store.url={url}", "splice_bos=false"]
    stage("stage_eval", *evaluation, f"model.path={harvester.model}")
    assert (tmp_path / "remote/eval.json").exists()
    store = open_io(url)
    key = Store.open(url).committed()[1].arrays["layers/1/resid_post"].key
    data = bytearray(store.get(key))
    data[50] ^= 1
    store.put(key, [data], replace=True)
    assert f"damaged shard 1: {key}" in stage("shared.store", "verify", url, status=1)
    stage("shared.store", "drop-incomplete", "--damaged", url)
    stage("stage_harvest", *on_s3(harvester, url))
    assert everything(open_io(url)) == everything(LocalIO(local.url))


def test_the_server_dies_in_mid_harvest(harvester: Harvester, local: Store, bucket: str, server) -> None:
    """kill -9 of the gateway while the harvest's command runs: it waits, goes on, and nothing is lost or doubled."""
    url = f"s3://{bucket}/dying/store"
    process = harvester.server.start("stage_harvest", *on_s3(harvester, url))
    io, deadline = open_io(url), time.monotonic() + 90
    while len(io.listing("manifest")) < 2:
        assert process.poll() is None, process.errors
        assert time.monotonic() < deadline
    server.kill()
    time.sleep(1)
    assert process.poll() is None, "the harvest had ended before the server died"
    server.start()
    assert process.wait(120) == 0, process.errors
    assert "trying again" in process.errors
    assert everything(io) == everything(LocalIO(local.url))
    assert verify(url).intact


def test_the_server_dies_in_mid_stream(server, url: str, tmp_path: Path) -> None:
    """The batches read while the gateway is killed and comes back are those of a local copy, token for token."""
    plan = synthetic_plan(num_contexts=48, seq_len=256, d_model=256)
    with ThreadPoolExecutor(2) as pool:
        remote, here = pool.map(lambda where: synthetic_store(where, plan), (url, tmp_path / "local"))
    order = StreamOrder(batch_size=256, seed=0, lanes=4, mix_contexts=2)

    def stream(store: Store) -> TokenStream:
        data = TrainingData([StoreSlice(store, store.contexts("train"))])
        made = TokenStream(data, {HOOK: (256, torch.bfloat16)}, order, prefetch_bytes=0)
        made.stop_at(1, 0)
        return made

    restart: threading.Thread | None = None
    count = 0
    with stream(remote) as ours, stream(here) as expected:
        for found, wanted in zip(ours, expected, strict=True):
            assert torch.equal(found.activations[HOOK], wanted.activations[HOOK])
            count += found.num_tokens
            if found.index == 5:
                server.kill()
                restart = threading.Thread(target=lambda: (time.sleep(1.5), server.start()))
                restart.start()
        assert ours.wait_seconds > 1, "nothing was read while the server was away"
    assert restart is not None
    restart.join()
    assert count == int(here.mask(here.contexts("train")).sum())
