"""Encode, decode and forward under OpenSAE's names, for every activation; and all of it without triton."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.sae import SAE
from shared.sae.learn.objective import Objective
from shared.sae.learn.opensae import OpenSAEForward
from tests.foreign import write_opensae
from tests.formulas import ACTIVATIONS, NORMALISATIONS, PROVENANCE, D, F, activations, make_sae
from tests.learning import LearningSAE


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_encode_has_opensae_fields(activation: str, normalisation: str) -> None:
    sae, x = make_sae(activation, normalisation, True), activations()
    encoded = sae.encode(x, return_all_features=True)
    assert encoded.sparse_feature_activations is encoded.values
    assert encoded.sparse_feature_indices is encoded.indices
    normal, _, _ = sae.normalise(x)
    features = ((normal - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    torch.testing.assert_close(encoded.all_features, features)
    # What fires has a positive pre-activation, and but for gated latents, whose magnitude is another, that value.
    dense = encoded.to_dense(F)
    assert ((dense == 0) | (features > 0)).all()
    if activation != "gated":
        torch.testing.assert_close(dense[dense > 0], features[dense > 0])
    assert sae.encode(x).all_features is None
    if normalisation == "layer_norm":
        assert encoded.input_mean is not None
        assert encoded.input_mean.shape == encoded.input_std.shape == (len(x), 1)
        torch.testing.assert_close(encoded.input_mean, x.mean(-1, keepdim=True))
        torch.testing.assert_close(encoded.input_std, x.std(-1, correction=0, keepdim=True) + 1e-5)
    else:
        assert encoded.input_mean is encoded.input_std is None


def test_forward_has_opensae_fields() -> None:
    sae, x = make_sae("topk", "layer_norm", True), activations()
    output = OpenSAEForward(Objective(sae))(x, return_all_features=True)
    encoded = sae.encode(x)
    assert torch.equal(output.sae_output, sae.decode(encoded))
    assert torch.equal(output.sparse_feature_activations, encoded.values)
    assert torch.equal(output.sparse_feature_indices, encoded.indices)
    assert output.all_features.shape == (len(x), F)
    assert torch.equal(output.input_mean, encoded.token_mean)
    assert torch.equal(output.input_std, encoded.token_scale)
    names = ("loss", "reconstruction_loss", "auxk_loss", "multi_topk_loss", "l1_loss")
    assert [getattr(output, name) for name in names] == [None] * 5  # not asked for


def fvu(sae: SAE, x: Tensor, x_hat: Tensor) -> Tensor:
    """Squared error over the data's variance, both in normalised units."""
    normal, given = sae.normalise(x_hat)[0], sae.normalise(x)[0]
    return (normal - given).square().sum() / (len(x) * sae.input_variance.sum())


def test_forward_has_opensae_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = LearningSAE(d_model=D, d_latent=F, k=3, normalisation="scale", multi_topk_weight=1 / 8, generator=generator)
    x = activations()
    sae.initialise(None, x)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::3] = True
    output = OpenSAEForward(sae.objective)(x, dead, return_losses=True)
    torch.testing.assert_close(output.reconstruction_loss, fvu(sae, x, output.sae_output))
    wider = SAE(replace(sae.config, k=4 * 3))
    wider.load_state_dict(sae.state_dict())
    torch.testing.assert_close(output.multi_topk_loss, fvu(sae, x, wider(x).sae_output))
    total = output.reconstruction_loss + output.multi_topk_loss / 8 + sae.learning.auxk_alpha * output.auxk_loss
    torch.testing.assert_close(output.loss.detach(), total)
    assert output.l1_loss is None
    output.loss.backward()
    assert sae.W_enc.grad.abs().sum() > 0


def test_forward_has_the_l1_loss() -> None:
    fields = {"activation": "relu", "penalty": "l1", "penalty_weight": 0.1, "normalisation": "scale"}
    sae = LearningSAE(d_model=D, d_latent=F, generator=torch.Generator().manual_seed(0), **fields)
    x = activations()
    sae.initialise(None, x)
    output = OpenSAEForward(sae.objective)(x, return_losses=True)
    torch.testing.assert_close(output.loss.detach(), output.reconstruction_loss + 0.1 * output.l1_loss)
    torch.testing.assert_close(output.l1_loss, output.sparse_feature_activations.sum(-1).mean())


def test_leading_dimensions_are_kept() -> None:
    sae, x = make_sae("jumprelu", "centre_scale", True), activations().view(4, -1, D)
    output = sae(x, return_all_features=True)
    assert output.sae_output.shape == x.shape
    assert output.all_features.shape == (*x.shape[:2], F)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from shared.sae import SAE
from shared.sae.learn.objective import Objective
from shared.sae.learn.opensae import OpenSAEForward
for folder in sys.argv[1:]:
    sae = SAE.from_pretrained(folder)
    x = torch.randn(5, sae.config.d_model)
    forward = OpenSAEForward(Objective(sae))
    output = forward(x, return_losses=sae.config.activation == "topk", return_all_features=True)
    assert torch.equal(output.sae_output, sae.decode(sae.encode(x)))
    print(folder.rsplit("/", 1)[1], tuple(output.sparse_feature_indices.shape[:1]), output.loss is not None)
"""


def test_one_line_loads_any_format_without_triton(tmp_path: Path) -> None:
    for activation in ACTIVATIONS:
        make_sae(activation, "centre_scale", True).save_pretrained(tmp_path / activation, PROVENANCE)
    write_opensae(tmp_path / "opensae", normalise=True, shift_back=True, shards=True)
    names = [*ACTIVATIONS, "opensae"]
    command = [sys.executable, "-c", WITHOUT_TRITON, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} (5,) {name in ('topk', 'opensae')}" for name in names]
