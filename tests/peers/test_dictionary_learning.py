"""dictionary_learning both ways, by the package itself."""

import warnings
from pathlib import Path

import pytest
import torch

from shared.sae.loading import convert, load_any
from tests.foreign import write_dictionary_learning
from tests.formulas import PROVENANCE, activations, assert_same, make_sae

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    reason = "dictionary_learning is not in this environment: make test-peers"
    package = pytest.importorskip("dictionary_learning.utils", reason=reason)


def computes(folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction) by the folder as dictionary_learning loads it."""
    from dictionary_learning.dictionary import AutoEncoder

    dictionary, config = package.load_dictionary(str(folder), device="cpu")
    if config["trainer"]["dict_class"] == "AutoEncoder":  # load_dictionary brings its decoder rows to unit norm
        dictionary = AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
    with torch.no_grad():
        latents = dictionary.encode(x)
        return latents, dictionary.decode(latents)


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_it_computes_what_is_written_here(tmp_path: Path, activation: str, normalisation: str, pre_bias: bool) -> None:
    sae, x = make_sae(activation, normalisation, pre_bias), activations()
    sae.save_pretrained(tmp_path / "ours", PROVENANCE)
    convert(tmp_path / "ours", tmp_path / "theirs", "dictionary_learning")
    assert_same(sae, *computes(tmp_path / "theirs", x), x)


@pytest.mark.parametrize(
    "dict_class",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
    ],
)
def test_its_classes_are_read(tmp_path: Path, dict_class: str) -> None:
    write_dictionary_learning(tmp_path / "theirs", dict_class)
    x = activations()
    assert_same(load_any(tmp_path / "theirs")[0], *computes(tmp_path / "theirs", x), x)
