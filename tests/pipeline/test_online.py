"""``online=true``: the weights of the two commands, never more on disk than the window, and nothing left."""

import signal
from collections.abc import Callable, Iterator
from operator import methodcaller
from pathlib import Path

import psutil
import pytest
import torch

from shared.basics.run_folder import RunFolder
from shared.sae import SAE
from shared.store import Store
from shared.store.capacity import shard_bytes
from stage_train.state.checkpoint import newest_checkpoint
from tests.cli import Child, ForkServer
from tests.harvesting import Harvester, twice_the_text
from tests.pipeline.test_window import CONTEXTS, SHARD, Watcher, training, wait_for

pytestmark = pytest.mark.slow

SETTINGS: dict[str, object] = {
    "corpus__contexts": CONTEXTS,
    "store__shard_contexts": SHARD,
    "store__heldout_fraction": 0,
}


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    folder = tmp_path_factory.mktemp("online")
    return twice_the_text(folder, stages.at(folder))


@pytest.fixture(scope="module")
def plain(harvester: Harvester) -> Store:
    """The same harvest into a store that stays."""
    return harvester.harvest("plain", **SETTINGS, run_dir=harvester.root / "plain_run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The RAM disk; nothing may be on it in the end."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def arguments(harvester: Harvester, name: str, disk: Path, window: int, *more: str) -> list[str]:
    """The one command line; `more` for training."""
    given = harvester.arguments(**{**SETTINGS, "store__heldout_fraction": None}, store__window=window)
    told = [one for one in given if not one.startswith(("store.url=", "run_dir="))]
    train = [one for one in training(harvester.root / name, Path(), *more) if not one.startswith("store.url=")]
    return ["online=true", f"ram_disk={disk}", *(f"harvest.{one}" for one in told), *train]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(SAE.from_pretrained(folder).state_dict())


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def in_store(disk: Path, wanted: str) -> Callable[[], bool]:
    return lambda: any(disk.glob(f"granary-online-*/store/{wanted}"))


def test_the_weights_are_those_of_a_plain_store(harvester: Harvester, plain: Store, disk: Path) -> None:
    """A window that holds all of it is one block: the order is that of one epoch of a store without a window."""
    window = 2 * plain.num_shards * shard_bytes(plain.plan)
    trained = harvester.server.run("stage_train", *arguments(harvester, "whole", disk, window))
    assert trained.code == 0, trained.stderr
    other = harvester.server.run("stage_train", *training(harvester.root / "two", Path(plain.url)))
    assert other.code == 0, other.stderr
    assert same(harvester.root / "whole", harvester.root / "two")
    assert "its activations are gone; harvest other text" in trained.stderr
    assert str(disk) not in trained.stderr


def windowed(harvester: Harvester, plain: Store, name: str) -> Path:
    """What harvest and training of a windowed store on a disk learn, as two commands."""
    store, out = harvester.root / name / "store", harvester.root / name / "sae"
    harvest = harvester.server.start(
        "stage_harvest",
        *harvester.arguments(
            f"{name}/store", **SETTINGS, store__window=4 * shard_bytes(plain.plan), run_dir=harvester.root / name
        ),
    )
    wait_for(lambda: (store / "extents/00000000.tokens.json").exists(), harvest)
    trained = harvester.server.run("stage_train", *training(out, store))
    assert trained.code == 0, trained.stderr
    assert harvest.finish().code == 0
    return out


def test_never_more_than_the_window_and_killed_at_any_moment(harvester: Harvester, plain: Store, disk: Path) -> None:
    window = 4 * shard_bytes(plain.plan)
    words = arguments(harvester, "killed", disk, window, "checkpoint.every=3")
    moments = (
        in_store(disk, ""),
        in_store(disk, "extents/00000000.tokens.json"),
        in_store(disk, "manifest/00000001.json"),
        in_store(disk, "window/freed/00000000.json"),
        in_store(disk, "window/freed/00000001.json"),
    )
    for moment in moments:
        process = harvester.server.start("stage_train", *words)
        wait_for(moment, process)
        process.kill()
        wait_for(lambda: not any(disk.iterdir()), process)
    assert newest_checkpoint(RunFolder(harvester.root / "killed").checkpoints) is not None
    process = harvester.server.start("stage_train", *words)
    wait_for(lambda: any(disk.glob("granary-online-*/store")), process)
    watcher = Watcher(next(disk.glob("granary-online-*/store")), frozenset())
    watcher.start()
    assert process.finish().code == 0, process.errors
    watcher.stopped = True
    watcher.join()
    assert 0 < watcher.most <= window
    assert same(harvester.root / "killed", windowed(harvester, plain, "by_two"))


def stopped(harvester: Harvester, disk: Path, plain: Store, name: str, stop: Callable[[Child], None]) -> Child:
    words = arguments(harvester, name, disk, 4 * shard_bytes(plain.plan), "checkpoint.every=3")
    process = harvester.server.start("stage_train", *words)
    wait_for(in_store(disk, "window/freed/00000000.json"), process)
    stop(process)
    process.wait()
    return process


def test_a_signal_saves_and_leaves_nothing(harvester: Harvester, plain: Store, disk: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = stopped(harvester, disk, plain, "signalled", methodcaller("send_signal", number))
        assert process.poll() == code
        assert not any(disk.iterdir())
        assert "the same command continues" in process.errors


def test_a_stage_that_dies_ends_the_other(harvester: Harvester, plain: Store, disk: Path) -> None:
    for module in ("stage_harvest", "stage_train"):

        def kill(process: Child, module: str = module) -> None:
            for child in psutil.Process(process.pid).children():
                if module in child.cmdline():
                    child.kill()

        assert stopped(harvester, disk, plain, f"without_{module}", kill).poll() == 128 + signal.SIGKILL
        assert not any(disk.iterdir())


def test_what_the_harvest_refuses_is_one_line(harvester: Harvester, plain: Store, disk: Path) -> None:
    for wrong, told in (
        ("harvest.hooks.layer=1", "layer"),
        ("harvest.hooks.layers=99", "layer 99 is not in the model"),
    ):
        words = arguments(harvester, "refused", disk, 4 * shard_bytes(plain.plan))
        assert told in harvester.server.run("stage_train", *words, wrong).error
    small = arguments(harvester, "refused", disk, 100)
    assert "store.window of 100 bytes is too small" in harvester.server.run("stage_train", *small).error
