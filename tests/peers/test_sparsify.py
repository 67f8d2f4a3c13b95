"""sparsify both ways, by the package itself."""

import warnings
from pathlib import Path

import pytest
import torch

from shared.sae.loading import convert, load_any
from tests.foreign import foreign_weights
from tests.formulas import PROVENANCE, D, F, K, activations, assert_same, make_sae

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sparsify = pytest.importorskip("sparsify", reason="sparsify is not in this environment: make test-peers")


def computes(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction) by the folder as sparsify loads it."""
    sae = sparsify.SparseCoder.load_from_disk(folder).requires_grad_(False)
    encoded = sae.encode(x)
    latents = torch.zeros(len(x), F).scatter_(1, encoded.top_indices, encoded.top_acts)
    return latents, sae.decode(encoded.top_acts, encoded.top_indices)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale"])
def test_sparsify_computes_what_is_written_here(tmp_path: Path, normalisation: str, pre_bias: bool) -> None:
    sae, x = make_sae("topk", normalisation, pre_bias), activations()
    sae.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    assert_same(sae, *computes(tmp_path / "theirs", x), x)


def test_what_sparsify_saves_is_read(tmp_path: Path) -> None:
    given, x = foreign_weights(), activations()
    made = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K))
    made.load_state_dict({name: given[name] for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")})
    folder = tmp_path / "layers.7"
    made.save_to_disk(folder)
    sae, provenance = load_any(folder)
    assert_same(sae, *computes(folder, x), x)
    assert provenance["hook"] == "layers.7.resid_post"
