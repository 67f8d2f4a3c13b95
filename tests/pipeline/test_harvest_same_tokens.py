"""``corpus=store``: the tokens of a store that exists, at other sites or with another model."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from transformers import LlamaConfig, LlamaForCausalLM

from shared.store import Store
from shared.store.beside import open_beside
from shared.store.verify import drop_incomplete, verify
from tests.cli import ForkServer
from tests.harvesting import LAYERS, VOCAB, Harvester, make_model

OLD, ADDED = "layers.1.resid_post", "layers.2.mlp_out"
SAME_TOKENS = {
    "corpus__files": None, "corpus__separator": None, "packing__seq_len": None, "store__shard_contexts": None,
    "store__dtype": None, "batch_contexts": None, "corpus": "store",
}  # fmt: skip


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("same_tokens")
    made = Harvester(root, stages.at(root))
    made.harvest(packing__mask_first=2, store__heldout_fraction=0.2)
    return made


@pytest.fixture(scope="module")
def whole(harvester: Harvester) -> Path:
    """The store with a second site."""
    folder = harvester.root / "whole"
    shutil.copytree(harvester.root / "store", folder)
    result = add(harvester, folder)
    assert result.code == 0, result.stderr
    return folder


@pytest.fixture
def url(harvester: Harvester, tmp_path: Path) -> Path:
    """A store of one site of its own."""
    shutil.copytree(harvester.root / "store", tmp_path / "store")
    return tmp_path / "store"


def add(harvester: Harvester, url: Path, **changes: object):
    given = {"corpus__path": url, "store__url": url, "hooks__layers": 2, "hooks__sites": "[mlp_out]", **changes}
    return harvester.run(**{**SAME_TOKENS, **given})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_added_site_has_the_values_of_one_harvest_of_both(harvester: Harvester, whole: Path, url: Path) -> None:
    before, after, digest = contents(url), contents(whole), Store.open(url).digest()
    store = Store.open(whole)
    both = harvester.harvest(
        "both", hooks__layers="1-2", hooks__sites="[resid_post,mlp_out]", packing__mask_first=2,
        store__heldout_fraction=0.2,
    )  # fmt: skip
    assert store.hooks == [OLD, ADDED]
    for hook in store.hooks:
        for context in range(both.num_contexts):
            assert torch.equal(store.read_context(hook, context), both.read_context(hook, context)), (hook, context)
        assert store.statistics(hook).summary() == both.statistics(hook).summary()
        assert store.width(hook) == both.width(hook)
    assert {name: after[name] for name in before} == before, "what was there is as it was"
    assert store.digest() == digest, "runs that were trained from it go on"
    array = zarr.open_group(whole, mode="r")["layers/2/mlp_out"]
    np.testing.assert_array_equal(array[:], np.stack([both.read_context(ADDED, c) for c in range(both.num_contexts)]))

    again = add(harvester, whole)
    assert again.code == 0
    assert "harvested" not in again.stderr
    assert contents(whole) == after, "a finished harvest writes nothing"
    report = verify(str(whole))
    assert report.intact
    assert not report.foreign + report.uncommitted + report.leftovers


def test_sites_are_added_again_and_again(harvester: Harvester, whole: Path, url: Path) -> None:
    shutil.copytree(whole, url, dirs_exist_ok=True)
    twice = add(harvester, url, hooks__sites="[resid_post,mlp_out]")
    assert twice.code == 2
    assert f"has {ADDED} already: name only the hooks to add" in twice.stderr
    third = add(harvester, url, hooks__layers=0, hooks__sites="[attn_in,attn_out]")
    assert third.code == 0, third.stderr
    assert sorted(Store.open(url).hooks) == sorted([OLD, ADDED, "layers.0.attn_in", "layers.0.attn_out"])


def test_a_killed_addition_is_invisible_then_completed_with_the_same_bytes(
    harvester: Harvester, whole: Path, url: Path
) -> None:
    name = next((whole / "additions").iterdir()).name
    shutil.copytree(whole, url, dirs_exist_ok=True)
    for gone in ("_COMPLETE.json", "manifest/00000001.json"):  # as if killed while it wrote shard 1
        (url / "additions" / name / gone).unlink()
    torn = url / "layers/2/mlp_out/c/1/0/0"
    torn.rename(torn.with_name(".0.tmp"))
    assert Store.open(url).hooks == [OLD]
    assert verify(str(url)).intact

    other = add(harvester, url, batch_contexts=1)
    assert other.code == 2
    assert "another harvest is adding sites" in other.stderr
    assert "batch_contexts is 2, not 1" in other.stderr

    drop_incomplete(str(url))
    result = add(harvester, url)
    assert result.code == 0, result.stderr
    assert contents(url) == contents(whole)


def test_a_damaged_shard_of_an_added_site_is_found_and_made_again(harvester: Harvester, whole: Path, url: Path) -> None:
    shutil.copytree(whole, url, dirs_exist_ok=True)
    place = url / "layers/2/mlp_out/c/0/0/0"
    flipped = bytearray(place.read_bytes())
    flipped[100] ^= 1
    place.write_bytes(flipped)
    report = verify(str(url))
    assert not report.intact
    assert not report.problems
    drop_incomplete(str(url), report)
    assert Store.open(url).hooks == [OLD]
    assert add(harvester, url).code == 0
    assert contents(url) == contents(whole)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_model_beside_it(harvester: Harvester, url: Path, nproc: int) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    chat = make_model(url.parent / "chat", LlamaForCausalLM(config))
    (chat / "tokenizer.json").unlink()  # the tokens are there
    beside = url.parent / "beside"
    given = {"model": chat, "store__url": beside, "hooks__layers": 1, "hooks__sites": "[resid_post]"}
    result = add(harvester, url, **given, nproc=nproc)
    assert result.code == 0, result.stderr
    both = open_beside(str(url), [("chat", str(beside))])
    assert both.hooks == [OLD, f"chat:{OLD}"]
    assert both.width(f"chat:{OLD}") == 24
    assert len(both.committed()) == both.num_shards
    assert both.heldout_shards == Store.open(beside).heldout_shards
    assert Store.open(beside).plan.dtype == "bfloat16", "how the rows are stored is this harvest's choice"
    assert Store.open(beside).plan.provenance["packing"] == Store.open(url).plan.provenance["packing"]

    inside = add(harvester, url, model=chat)
    assert inside.code == 2
    assert "is of another model" in inside.stderr
    assert "into its own store.url" in inside.stderr


def test_what_does_not_fit_is_refused_in_one_line(harvester: Harvester, url: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    small = make_model(url.parent / "small", LlamaForCausalLM(config))
    other = url.parent / "other"
    for changes, message in (
        ({"model": small, "store__url": other}, "has a vocabulary of 40 tokens, but"),
        ({"packing": "joined"}, f"packing.mode=joined: with corpus=store it is as in {url}, isolated: leave it out"),
        ({"store__dtype": "int8"}, "store.dtype=int8: with corpus=store"),
        ({"corpus__path": url.parent / "nothing"}, "no activation store at"),
        ({"store__window": "1MB"}, "store.window"),
    ):
        before = contents(url)
        result = add(harvester, url, **changes)
        assert result.code == 2, (changes, result.stderr)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert contents(url) == before
        assert not other.exists()
