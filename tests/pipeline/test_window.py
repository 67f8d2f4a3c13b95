"""A window of a few shards, the harvest and the training as two real processes, killed and started again."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from shared.basics.metrics_file import read_metrics
from shared.sae import SAE
from shared.store import Store, WindowPlan
from shared.store.capacity import shard_bytes
from shared.store.verify import verify
from tests.cli import Child, ForkServer
from tests.harvesting import Harvester, twice_the_text

CONTEXTS, SHARD = 24, 2


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    folder = tmp_path_factory.mktemp("window")
    return twice_the_text(folder, stages.at(folder))


@pytest.fixture(scope="module")
def whole(harvester: Harvester) -> Store:
    """The same harvest without a window."""
    return harvester.harvest("whole", **SETTINGS)


SETTINGS: dict[str, object] = {
    "corpus__contexts": CONTEXTS,
    "store__shard_contexts": SHARD,
    "store__heldout_fraction": 0.1,
}


class Watcher(threading.Thread):
    """The most bytes of activations outside the held-out shards that were ever on disk."""

    def __init__(self, folder: Path, heldout: frozenset[int]) -> None:
        super().__init__(daemon=True)
        self.folder, self.heldout, self.most, self.stopped = folder, heldout, 0, False

    def run(self) -> None:
        before: dict[int, int] = {}
        while not self.stopped:
            after = self.files()
            # what both looks saw was there at once; one look alone counts a freed shard beside the one after it
            self.most = max(self.most, sum(size for inode, size in after.items() if before.get(inode) == size))
            before = after
            time.sleep(0.005)

    def files(self) -> dict[int, int]:
        """The size of each file of a shard that is not held out, by inode: one being published has two names."""
        sizes = {}
        for path in self.folder.glob("layers/*/*/c/*/0/*"):
            if int(path.parent.parent.name) not in self.heldout:
                with suppress(FileNotFoundError):
                    status = path.stat()
                    sizes[status.st_ino] = status.st_size
        return sizes


def training(folder: Path, store: Path, *more: str) -> list[str]:
    return [f"run_dir={folder}", f"out_dir={folder}", f"store.url={store}", "sae.k=3", "sae.expansion=4",
            "stream.batch_size=16", "stream.lanes=4", "stream.mix_contexts=2", "schedule.tokens=null",
            "schedule.epochs=1", "logger.every=1", "logger.progress=false", "logger.curves=false",
            "checkpoint.every=0", "sae.dead_after_tokens=500", *more]  # fmt: skip


def wait_for(condition: Callable[[], bool], process: Child, seconds: float = 280) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, process.errors
        time.sleep(0.02)


def run_both(harvester: Harvester, whole: Store, name: str, kills: int) -> None:
    """Harvest and train at once, kill each of them some times; then everything is as if nothing had happened."""
    store, out, launch = harvester.root / name / "store", harvester.root / name / "sae", harvester.server.start
    window = 4 * shard_bytes(whole.plan)
    blocks = WindowPlan.of(whole.plan, window)
    harvest = harvester.arguments(f"{name}/store", **SETTINGS, store__window=window, run_dir=out.parent)
    train = training(out, store)
    watcher = Watcher(store, whole.heldout_shards)
    watcher.start()
    harvesting = launch("stage_harvest", *harvest)
    wait_for(lambda: (store / "extents/00000000.tokens.json").exists(), harvesting)
    wait_for(lambda: len(list((store / "manifest").glob("*.json"))) == blocks.ends[1], harvesting)
    time.sleep(0.3)
    assert len(list((store / "manifest").glob("*.json"))) == blocks.ends[1], "the harvest did not wait for training"
    process = launch("stage_train", *train)
    for kill in range(kills):
        # by turns, each time two blocks further
        wait_for(lambda kill=kill: len(list((store / "window/freed").glob("*.json"))) > kill, process)
        for victim, module, arguments in ((process, "stage_train", train), (harvesting, "stage_harvest", harvest)):
            victim.kill()
            victim.wait()
            again = launch(module, *arguments)
            process, harvesting = (again, harvesting) if module == "stage_train" else (process, again)
    for last in (process, harvesting):
        assert last.finish().code == 0, last.errors
    watcher.stopped = True
    watcher.join()
    assert 0 < watcher.most <= window
    left = Store.open(store)
    assert left.complete
    assert left.passed_shards() == set(range(whole.num_shards)) - whole.heldout_shards
    assert len(left.contexts("heldout")) == len(whole.contexts("heldout"))
    report = verify(str(store))
    assert report.intact
    assert report.leftovers == []
    lines = read_metrics(out)
    assert lines[-1]["tokens"] == int(whole.mask(whole.contexts("train")).sum())
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_two_processes_killed_in_the_middle_lose_nothing(harvester: Harvester, whole: Store) -> None:
    run_both(harvester, whole, "killed", kills=1)


@pytest.mark.slow
def test_many_kills_do_not_change_what_is_learnt(harvester: Harvester, whole: Store) -> None:
    """The order is a pure function of store plan, seed and window, so the weights are equal bit for bit."""
    run_both(harvester, whole, "many", kills=4)
    run_both(harvester, whole, "calm", kills=0)
    first, second = (SAE.from_pretrained(harvester.root / name / "sae").state_dict() for name in ("many", "calm"))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    arguments = training(harvester.root / "late", harvester.root / "calm/store")
    assert "is being read by the run in" in harvester.server.run("stage_train", *arguments).error


@pytest.mark.slow
def test_a_training_that_ends_early_ends_the_harvest(harvester: Harvester, whole: Store) -> None:
    arguments = harvester.arguments(
        "early/store", **SETTINGS, store__window=4 * shard_bytes(whole.plan), run_dir=harvester.root / "early"
    )
    harvesting = harvester.server.start("stage_harvest", *arguments)
    store = harvester.root / "early/store"
    wait_for(lambda: (store / "extents/00000000.tokens.json").exists(), harvesting)
    out = harvester.root / "early/sae"
    train = training(out, store, "schedule.epochs=null", "schedule.tokens=200")
    trained, harvested = harvester.server.run("stage_train", *train), harvesting.finish()
    assert trained.code == 0, trained.stderr
    assert harvested.code == 0, harvested.stderr
    assert "training has ended" in harvested.stderr
    assert verify(str(store)).problems == []
