"""sparsify both ways, by the package itself."""

import warnings
from pathlib import Path

import pytest
import torch

from shared.sae.loading import convert, load_any
from shared.sae.sites import Sites
from tests import foreign_transcoders as theirs
from tests.circuits import assert_same as same_transcoder
from tests.circuits import started
from tests.foreign import foreign_weights
from tests.foreign_transcoders import tokens, write_sparsify
from tests.formulas import PROVENANCE, D, F, K, activations, assert_same, make_sae

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sparsify = pytest.importorskip("sparsify", reason="sparsify is not in this environment: make test-peers")


BETWEEN = Sites(("layers.3.mlp_in",), ("layers.3.mlp_out",))


def transcodes(folder: Path, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Latents, all that is written) by the folder as sparsify loads it."""
    coder = sparsify.SparseCoder.load_from_disk(folder).requires_grad_(False)
    encoded = coder.encode(x_ND)
    dense_NF = torch.zeros(len(x_ND), coder.num_latents).scatter_(1, encoded.top_indices, encoded.top_acts)
    return dense_NF.double(), coder(x_ND).sae_out.double()


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


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("normalisation", ["none", "centre_scale"])
def test_sparsify_computes_the_transcoders_written_here(tmp_path: Path, normalisation: str, kind: str) -> None:
    made, x_ND = started(kind, BETWEEN, activation="topk", normalisation=normalisation)
    made.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", "sparsify")
    same_transcoder(made, x_ND, *transcodes(tmp_path / "theirs", x_ND))


@pytest.mark.parametrize("skip", [True, False])
def test_transcoders_that_sparsify_saves_are_read(tmp_path: Path, skip: bool) -> None:
    write_sparsify(tmp_path / "made", skip=skip)
    folder = tmp_path / "layers.3.mlp"
    sparsify.SparseCoder.load_from_disk(tmp_path / "made").save_to_disk(folder)
    made, _ = load_any(folder)
    assert (made.config.kind, made.sites) == ("skip_transcoder" if skip else "transcoder", BETWEEN)
    x_ND = tokens(theirs.D)
    same_transcoder(made, x_ND, *transcodes(folder, x_ND))
