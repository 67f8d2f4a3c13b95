"""A disk that is full, read-only or broken, at every write of every stage: one line, nothing half, nothing left."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.sae import SAE, SAEConfig
from tests.cli import ForkServer
from tests.disk import BROKEN, FULL, READ_ONLY, Call, FailingDisk, check_failure, half_files, leftovers, spread

TRAIN = (
    "sae.d_latent=24",
    "sae.k=2",
    "sae.dead_after_tokens=400",
    "stream.batch_size=64",
    "schedule.tokens=500",
    "checkpoint.every=0.5",
    "logger.every=4",
    "logger.progress=false",
)


HARVEST = (
    "debug=tiny_harvest",
    "corpus=tokens",
    "corpus.contexts=4",
    "corpus.dtype=uint16",
    "packing.seq_len=32",
    "hooks.layers=0",
    "model.probe=false",
)
STAGES = ("harvest", "train", "eval", "export", "granary", "saelens", "sparsify", "dictionary_learning", "opensae")
PARTS = 4  # none may take 300 s, on a busy machine either
# What a failure may be after: the result is whole and in its place, and only its flush or a line of the log is not.
SILENT = ("fsync", "write", "open")


@pytest.fixture
def server(stages: ForkServer) -> ForkServer:
    if stages.library is None:
        pytest.skip("needs a C compiler")
    return stages


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Stage:
    """A command, the folder it writes to, and what lies in that before."""

    def __init__(self, disk: FailingDisk, prepare: Callable[[Path], object] = lambda folder: None) -> None:
        self.disk, self.prepare = disk, prepare
        self.fresh()
        done = disk.run()
        assert done.code == 0, done.stderr
        self.calls = disk.distinct_calls()
        self.names = names(disk.folder)
        assert leftovers(disk.folder) == []
        assert list(half_files(disk.folder)) == []

    def fresh(self) -> None:
        shutil.rmtree(self.disk.folder, ignore_errors=True)
        self.prepare(self.disk.folder)

    def fail_and_run_again(self, call: Call, error: int) -> None:
        self.fresh()
        folder = self.disk.folder
        result = self.disk.run(call.number, error)
        if result.code == 0:
            assert call.what in SILENT, call
            assert names(folder) <= self.names, call
        else:
            check_failure(result)
        assert list(half_files(folder)) == [], call
        again = self.disk.run()
        if result.code == 0 and again.code == 2:
            assert "is not empty" in again.error, call
            return
        assert again.code == 0, (call, again.stderr)
        assert leftovers(folder) == [], call
        assert names(folder) == self.names, call


@pytest.fixture
def make(server: ForkServer, planted_store: Callable[..., object], tmp_path: Path) -> Callable[[str], Stage]:
    """The stage of a name, run once on a disk that does not fail."""
    folder = tmp_path / "run"

    def trained(place: Path) -> Path:
        planted_store(tmp_path / "store")
        done = server.run("stage_train", *TRAIN, f"run_dir={place}", f"store.url={tmp_path / 'store'}")
        assert done.code == 0, done.stderr
        return place / "sae"

    def stage(name: str) -> Stage:
        if name == "harvest":
            np.arange(1, 1000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
            arguments = [*HARVEST, f"corpus.files={tmp_path / 'ids.bin'}", f"run_dir={folder}"]
            return Stage(FailingDisk(server, folder, "stage_harvest", *arguments))
        if name == "train":
            planted_store(tmp_path / "store")
            arguments = [*TRAIN, f"run_dir={folder}", f"store.url={tmp_path / 'store'}"]
            return Stage(FailingDisk(server, folder, "stage_train", *arguments))
        if name == "eval":
            sae = trained(tmp_path / "trained")
            arguments = ["contexts=1", "downstream=false", f"run_dir={folder}", f"store.url={tmp_path / 'store'}"]
            disk = FailingDisk(server, folder, "stage_eval", *arguments, "hydra.output_subdir=null")
            return Stage(disk, lambda place: shutil.copytree(sae, place / "sae"))
        if name == "export":
            sae = trained(tmp_path / "trained")

            def unexported(place: Path) -> None:
                shutil.copytree(sae, place)
                (place / "config.json").unlink()
                (place / "sae.safetensors").unlink()

            return Stage(FailingDisk(server, folder, "stage_train.export", str(folder)), unexported)
        sae = tmp_path / "source"
        SAE(SAEConfig(d_model=12, d_latent=24, k=2)).save_pretrained(sae)
        return Stage(FailingDisk(server, folder, "shared.sae", "convert", str(sae), str(folder / "out"), "--to", name))

    return stage


@pytest.mark.parametrize(("name", "error"), [("train", FULL), ("eval", READ_ONLY), ("saelens", BROKEN)])
def test_a_disk_that_fails(make: Callable[[str], Stage], name: str, error: int) -> None:
    stage = make(name)
    assert len(stage.calls) > 10
    for call in spread(stage.calls, 3)[1:2]:
        stage.fail_and_run_again(call, error)


@pytest.mark.slow
@pytest.mark.parametrize("error", [FULL, READ_ONLY])
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", STAGES)
def test_every_write_of_every_stage(make: Callable[[str], Stage], name: str, part: int, error: int) -> None:
    stage = make(name)
    for call in stage.calls[part::PARTS]:
        stage.fail_and_run_again(call, error)
