"""Faults that peers have, by name, and inputs at the edges of what an inspection may meet."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from shared.sae.loading import load
from shared.sae.rows import decoder_rows
from shared.store import Store
from stage_inspect import job as jobs
from stage_inspect.inspect import inspect
from stage_inspect.scan.batches import given
from stage_inspect.scan.places import Places
from stage_inspect.scan.settings import Settings
from stage_inspect.scan.state import PartState, Wanted
from tests.inspection import HOOK, LATENTS, WIDTH, content, inspect_config, small_sae, small_store
from tests.synthetic import synthetic_plan, synthetic_shard, synthetic_tokens
from tests.variants import OF_ROWS, PLACES, make


def padded_store(folder: Path, *, hole: bool = False) -> Store:
    """The last context ends in padding; with a `hole`, shard 1 is not harvested yet."""
    plan = synthetic_plan(8, 40, WIDTH, shard_contexts=2, heldout_fraction=0.25)
    tokens, mask, segments = synthetic_tokens(plan)
    segments[-1, 25:] = -1
    mask[-1, 25:] = True  # a mask that is wrong about padding
    store = Store.create(folder, plan, tokens, mask & (segments >= 0), segments)
    for shard in store.pending():
        if not (hole and shard == 1):
            store.write_shard(shard, synthetic_shard(store, shard))
    return store


def test_masked_and_padding_tokens_are_in_no_count(tmp_path: Path) -> None:
    store = padded_store(tmp_path / "store")
    small_sae(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    latents = Latents.open(tmp_path / "latents")
    assert latents.meta.counts["tokens"] == int(store.mask(store.contexts("all")).sum())
    starts, tokens = latents.array("windows/start").all(), latents.array("windows/tokens").all()
    last = (starts // 40 == 7) & (starts % 40 >= 25)
    assert not last.any()
    assert all((one.tokens >= 0).all() for latent in range(LATENTS) for one in latents.top(latent))
    assert (tokens >= -1).all()


def test_hole_in_store(tmp_path: Path) -> None:
    store = padded_store(tmp_path / "store", hole=True)
    small_sae(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    latents = Latents.open(tmp_path / "latents")
    assert latents.meta.counts["contexts"] == 6
    assert not {one.context for latent in range(LATENTS) for one in latents.sample(latent)} & {2, 3}
    store.write_shard(1, synthetic_shard(store, 1))
    with pytest.raises(GranaryError, match="another dictionary, store or settings"):
        inspect(inspect_config(tmp_path))


def test_damaged_shard_is_told_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PART_TOKENS", 100)
    store = small_store(tmp_path / "store")
    small_sae(tmp_path / "sae")
    inspect(inspect_config(tmp_path, **{"latents.url": tmp_path / "sound"}))
    shard = tmp_path / "store" / "layers" / "2" / "resid_post" / "c" / "4" / "0" / "0"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:100] + bytes([sound[100] ^ 1]) + sound[101:])
    with pytest.raises(GranaryError, match=r"shard 4 of .* is damaged"):
        inspect(inspect_config(tmp_path))
    assert len(list((tmp_path / "latents" / "parts").iterdir())) >= 4
    shard.write_bytes(sound)
    inspect(inspect_config(tmp_path))
    assert content(tmp_path / "latents") == content(tmp_path / "sound")
    assert store.complete


def test_another_sae_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    small_store(tmp_path / "store")
    small_sae(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    before = content(tmp_path / "latents")
    shutil.rmtree(tmp_path / "sae")
    small_sae(tmp_path / "sae", seed=1)
    with pytest.raises(GranaryError, match=r"give latents\.overwrite=true"):
        inspect(inspect_config(tmp_path))
    assert content(tmp_path / "latents") == before


def test_dense_latent_equal_values_and_one_bin(tmp_path: Path) -> None:
    """A latent that fires everywhere with one value: ties by place, one bin, no silent window, and no error."""
    small_store(tmp_path / "store")
    sae = small_sae(tmp_path / "sae", "relu")
    with torch.no_grad():
        sae.W_enc[0] = 0
        sae.b_enc[0] = 1.5
    sae.save_pretrained(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    latents = Latents.open(tmp_path / "latents")
    found, table = latents.latent(0), latents.table
    assert table["fired"][0] == latents.meta.counts["tokens"]
    assert (table["density"][0], table["std"][0], table["kurtosis"][0]) == (1, 0, 0)
    assert np.count_nonzero(found.histogram) == 1
    assert latents.silent(0) == []
    places = [(one.context, one.position) for one in latents.top(0)]
    assert places == sorted(places)
    assert latents.silent(3, 5) != []  # the dead one is silent everywhere
    assert latents.top(3) == []


def test_negative_and_zero_values() -> None:
    """An activation that is not positive still counts as fired, in the lowest bin."""
    settings = Settings(
        window=8, top=3, sample=3, token_sample=3, together_tokens=8, pool=2, seed=0, origin=-4
    )  # fmt: skip
    state = PartState(2, 8, settings, Wanted(2, settings), 1.0, 1.0)
    tokens = np.arange(8, dtype=np.int32)[None]
    places = Places.of(np.arange(1), tokens, np.ones((1, 8), bool), np.zeros((1, 8), np.int32), window=8, isolated=True)
    values = np.array([-2, 0, -1, 1e30, 1e-30, -3, 70_000, 5], np.float32)[:, None]
    state.add(places, np.arange(8), np.zeros((8, 1), np.int64), values, False)
    assert state.counts["fired"].tolist() == [8, 0]
    assert state.histogram[0, 0] == 5
    assert state.histogram[0, -1] == 1
    top = state.blocks()[0]["top/value"]
    assert top.tolist() == [np.float32(1e30)]


@pytest.mark.parametrize("normalisation", ["layer_norm", "centre_scale"])
def test_values_are_those_that_encode_gives(tmp_path: Path, normalisation: str) -> None:
    store = small_store(tmp_path / "store")
    sae = small_sae(tmp_path / "sae", normalisation=normalisation)
    if normalisation == "centre_scale":
        sae.input_scale.fill_(0.37)
        sae.input_mean.fill_(0.1)
        sae.save_pretrained(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    latents = Latents.open(tmp_path / "latents")
    one = latents.top(int(latents.table["fired"].argmax()))[0]
    encoded = load(tmp_path / "sae").encode(store.read_context(HOOK, one.context)[one.position][None])
    latent = int(latents.table["fired"].argmax())
    value = encoded.values[0][encoded.indices[0] == latent]
    assert value.item() == pytest.approx(one.value, rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in OF_ROWS if kind != "sae"])
def test_every_kind_of_dictionary(tmp_path: Path, kind: str) -> None:
    dictionary = make(kind).dictionary
    sites, widths = PLACES[kind]
    hooks = dict(zip(sites.reads, widths.reads, strict=True)) | dict(zip(sites.writes, widths.writes, strict=True))
    store = small_store(tmp_path / "store", hooks=hooks)
    dictionary.save_pretrained(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    latents = Latents.open(tmp_path / "latents")
    assert latents.meta.dictionary["writes"] == list(sites.writes)
    latent = int(latents.table["fired"].argmax())
    one = latents.top(latent)[0]
    counts_1T = np.arange(store.seq_len)[None] == one.position
    read = {site: store.read_context(site, one.context) for site in sites.reads}
    x = given([read], sites, counts_1T, store.segments([one.context]), isolated=True)
    encoded = load(tmp_path / "sae").encode(x)
    assert encoded.values[0][encoded.indices[0] == latent].item() == pytest.approx(one.value, rel=1e-5)
    rows = torch.cat([group.W_dec.norm(dim=1) for group in dictionary.groups])
    assert np.allclose(latents.table["decoder_norm"], rows.detach().numpy(), rtol=1e-5)
    near = latents.neighbours(latent)[0]
    cosines = torch.nn.functional.normalize(decoder_rows(dictionary), dim=1) @ torch.nn.functional.normalize(
        decoder_rows(dictionary)[latent], dim=0
    )
    cosines[latent] = -2
    assert near.latent == int(cosines.argmax())


def test_a_dictionary_without_decoder_rows_is_refused(tmp_path: Path) -> None:
    sites, _ = PLACES["molt"]
    small_store(tmp_path / "store", hooks=dict(zip((*sites.reads, *sites.writes), (9, 7), strict=True)))
    make("molt").dictionary.save_pretrained(tmp_path / "sae")
    with pytest.raises(GranaryError, match=r"is a molt, whose latents are maps"):
        inspect(inspect_config(tmp_path))
