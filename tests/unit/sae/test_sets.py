"""Sets of dictionaries, one per layer: by what they record, in the order of the layers' numbers."""

from pathlib import Path

import pytest
import torch

from shared.basics.errors import GranaryError
from shared.sae import Transcoder, load_set
from shared.sae.sites import Sites, SiteWidths
from tests.variants import make


def save(folder: Path, layer: int) -> Path:
    places = (Sites((f"layers.{layer}.mlp_in",), (f"layers.{layer}.mlp_out",)), SiteWidths((5,), (5,)))
    make("transcoder", places=places, seed=layer, d_latent=8).dictionary.save_pretrained(folder)
    return folder


def test_f47_f48_by_the_layer_that_each_records(tmp_path: Path) -> None:
    """Not by the folder's name or its place in a listing: layer_10 comes after layer_9, and none is left out."""
    for layer in (10, 9, 2):
        save(tmp_path / "set" / f"layer_{layer}", layer)
    (tmp_path / "set" / "plots").mkdir()
    found = load_set(tmp_path / "set")
    assert list(found) == [2, 9, 10]
    for layer, one in found.items():
        assert isinstance(one, Transcoder)
        same = load_set(tmp_path / "set" / f"layer_{layer}")
        assert torch.equal(one.W_enc, next(iter(same.values())).groups[0].W_enc)
    assert list(load_set([save(tmp_path / "b", 3), save(tmp_path / "a", 1)])) == [1, 3]


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(GranaryError, match="no dictionary in"):
        load_set(tmp_path)
    with pytest.raises(GranaryError, match="both write layer 1: a set has one per layer"):
        load_set([save(tmp_path / "a", 1), save(tmp_path / "b", 1)])
    make("sae", places=(None, SiteWidths((5,), (5,))), d_latent=8, pre_bias=True).dictionary.save_pretrained(
        tmp_path / "nowhere"
    )
    with pytest.raises(GranaryError, match="does not record the one site that it writes"):
        load_set([tmp_path / "nowhere"])
