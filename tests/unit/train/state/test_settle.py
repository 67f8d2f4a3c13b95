"""Several SAEs on one store: each in a folder of its own, which the same command finds again."""

import logging
from pathlib import Path

import pytest

from stage_train.job import train as train_command
from stage_train.state.settle import difference, settled
from tests.training import WORLD, Runs, assert_same_run

pytestmark = pytest.mark.usefixtures("train_configs")


def folder_of(train: Runs, *overrides: str) -> str:
    """Where a run goes that is asked to go to ``sae``."""
    return Path(settled(train.cfg("sae", *overrides), WORLD).out_dir).name


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_sae_goes_beside_the_first(train: Runs, caplog: pytest.LogCaptureFixture) -> None:
    assert folder_of(train) == "sae"  # where nothing is yet
    first = train("sae")
    before = files_of(first)
    assert folder_of(train) == "sae"
    with caplog.at_level(logging.INFO):
        train_command([train.cfg("sae", "sae.k=2")])
    beside = train.folder / "sae,k=2"
    assert f"{first} holds another SAE (sae.k was 3, is 2): this one goes to {beside}" in caplog.text
    assert files_of(first) == before
    assert_same_run(train("alone", "sae.k=2"), beside)
    again = files_of(beside)
    train_command([train.cfg("sae", "sae.k=2")])  # done already
    assert files_of(beside).keys() == again.keys()
    assert (beside / "sae.safetensors").read_bytes() == again[beside / "sae.safetensors"]


def test_a_run_that_was_stopped_is_found_again(train: Runs) -> None:
    train.stopped("sae", step=5)
    train.stopped("sae,k=2", "sae.k=2", step=5)
    assert folder_of(train, "sae.k=2") == "sae,k=2"
    assert folder_of(train, "sae.k=2", "schedule.tokens=1280") == "sae,k=2"  # it goes on
    assert folder_of(train, "schedule.tokens=1280") == "sae"
    assert folder_of(train, "schedule.tokens=320") == "sae,tokens=320"
    assert folder_of(train, "sae.k=2", "seed=1") == "sae,k=2,seed=1"
    train.stopped("sae,k=1", "sae.k=2", "seed=7", step=5)  # a name that another run has
    assert folder_of(train, "sae.k=1").startswith("sae,k=1,")


def test_what_means_the_folder_itself(train: Runs) -> None:
    train.stopped("sae", step=5)
    for resume in ("never", "must"):
        assert folder_of(train, "sae.k=2", f"checkpoint.resume={resume}") == "sae"


def test_an_sae_without_its_checkpoints_is_not_overwritten(train: Runs) -> None:
    out = train("sae")
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert folder_of(train) == "sae"
    assert folder_of(train, "sae.k=2") == "sae,k=2"
    (out / "train.yaml").unlink()
    assert folder_of(train).startswith("sae,")


@pytest.mark.parametrize(
    ("held", "wanted", "name"),
    [
        ({"sae.k": 3, "seed": 0}, {"sae.k": 4, "seed": 0}, "k=4"),
        ({"sae.k": 3}, {"sae.k": None, "optim.lr": 1e-3}, "lr=0.001,k=null"),
    ],
)
def test_the_name_says_what_differs(held: dict[str, object], wanted: dict[str, object], name: str) -> None:
    assert difference(held, wanted) == name


def test_what_can_not_be_a_name_is_a_digest() -> None:
    for value in ("/data/x", "a b", "x" * 100, ["a", "b"]):
        name = difference({}, {"init_from": value})
        assert len(name) == 8
        assert name.isalnum()
