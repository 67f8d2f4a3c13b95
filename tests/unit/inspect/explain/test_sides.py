"""No document is on both sides, however often it was cut, in stores packed by the harvest's own packer."""

import itertools
from pathlib import Path

import pytest

from shared.latents.folder import Latents
from stage_harvest.config import BosPlacement, LongDocuments, PackingMode
from stage_inspect.explain.examples import choose
from stage_inspect.explain.sides import Sides
from stage_inspect.inspect import inspect
from tests.inspection import inspect_config, small_sae
from tests.packed import document_of, packed_store


@pytest.mark.parametrize("mode", ["isolated", "separate"])
def test_no_document_on_both_sides(tmp_path: Path, mode: str) -> None:
    store = packed_store(tmp_path / "store", PackingMode(mode), LongDocuments.split, BosPlacement.none)
    small_sae(tmp_path / "sae")
    changes = {"store.url": store.url, "latents.top": 60, "latents.sample": 120, "latents.pool": 120}
    inspect(inspect_config(tmp_path, **changes))
    latents = Latents.open(tmp_path / "latents")
    of_long = [set(), set()]
    for seed, number in itertools.product(range(4), (0, 1, 2)):
        chosen = choose(latents, number, Sides(store, seed), 60, 60)
        train = [document_of(one.tokens) for one in chosen.train + chosen.train_silent]
        tested = [document_of(one.example.tokens) for one in chosen.tested]
        assert min(len(train), len(tested)) > 4
        assert {len(one) for one in train + tested} == {1}
        assert not set.union(*train) & set.union(*tested)
        for side, of_side in zip(of_long, (train, tested), strict=True):
            side.add(sum({41} == one for one in of_side) > 1)
    assert of_long == [{False, True}, {False, True}]  # many parts of the long one, all on one side
