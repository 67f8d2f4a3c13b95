"""The command lines that one command makes for harvest and training at once, and what it refuses."""

import pytest

from shared.basics.errors import GranaryError
from stage_train.online.driver import commands, is_wanted


def test_what_each_stage_is_told(tmp_path):
    given = ["online=true", "name=x", "harvest.store.window=1GB", f"ram_disk={tmp_path}", "harvest.hooks.layers=3",
             "+harvest.model.path=m", "sae.k=8", "nproc=2"]  # fmt: skip
    assert is_wanted(given)
    assert is_wanted(["online=True"])
    assert not is_wanted(["online=false", "name=online=true"])
    made = commands(given)
    assert made.harvest == ["store.window=1GB", "hooks.layers=3", "+model.path=m", "name=x"]
    assert made.train == ["name=x", "sae.k=8", "nproc=2"]
    assert made.disk == tmp_path


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("harvest.store.url=x", "harvest.store.url=x: with online=true that is decided here"),
        ("harvest.store.heldout_fraction=0.1", "decided here"),
        ("harvest.spool_dir=x", "decided here"),
        ("store.url=x", "store.url=x does not go with online=true"),
        ("packed=true", "trains one SAE"),
        ("-m", "trains one SAE"),
        ("ram_disk=/nowhere", "there is no folder /nowhere"),
    ],
)
def test_what_does_not_go_together(argument, told):
    with pytest.raises(GranaryError, match=told):
        commands(["online=true", "harvest.store.window=1GB", argument])


def test_a_window_is_asked_for():
    with pytest.raises(GranaryError, match=r"harvest\.store\.window=8GB"):
        commands(["online=true"])
