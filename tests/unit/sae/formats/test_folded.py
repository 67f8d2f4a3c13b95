"""Normalisation folded into weights keeps every kind's function, with every activation it can have, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shared.sae import CLT
from shared.sae.formats.folded import Folded
from shared.sae.learn.init import initialise
from tests.variants import batch, make

KINDS: dict[str, dict[str, Any]] = {
    "transcoder": {},
    "skip_transcoder": {"skip_init": "ridge"},
    "crosscoder": {"pre_bias": False},
    "clt": {},
    "tied": {"tying": "per_target"},
}


@pytest.mark.parametrize("normalisation", ["none", "scale", "centre_scale"])
@pytest.mark.parametrize("activation", ["batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_f07_folding_over_the_full_grid(kind: str, activation: str, normalisation: str) -> None:
    """Sites of unequal scale; latents are as they were, and the reconstruction is to 1e-5."""
    objective = make(
        "clt" if kind == "tied" else kind, torch.float64, activation=activation, normalisation=normalisation,
        **KINDS[kind],
    )  # fmt: skip
    made = objective.dictionary
    x_ND, y_ND = batch(objective, 90)
    x_ND = x_ND * torch.linspace(0.2, 5, made.widths.d_in, dtype=torch.float64)
    y_ND = x_ND if made.config.is_autoencoder else y_ND * torch.linspace(5, 0.2, made.widths.d_out).double()
    initialise(objective, None, x_ND[:60], None, y_ND[:60])
    x_ND = x_ND[60:]  # of the others one is at batchtopk's threshold
    tensors = made.untied() if isinstance(made, CLT) else made.state_dict()
    folded = Folded.of(made.config, tensors, made.places, {}, "other")
    found_ND = folded.b_dec.double().expand(len(x_ND), -1).clone()
    if folded.W_skip is not None:
        found_ND += x_ND @ folded.W_skip.double().T
    fired = []
    for group, (reads, writes) in zip(folded.groups, made.places, strict=True):
        z_NF = F.linear(x_ND[:, reads], group.W_enc.double(), group.b_enc.double())
        f_NF = torch.relu(z_NF) * (z_NF > (0 if group.threshold is None else group.threshold.double()))
        fired.append(f_NF)
        found_ND[:, writes] += f_NF @ group.W_dec.double()
    expected = made(x_ND)
    dense_NF = expected.latents.to_dense(made.config.d_latent)
    torch.testing.assert_close(torch.cat(fired, 1), dense_NF, rtol=1e-5, atol=1e-5)
    assert float((found_ND - expected.x_hat).norm()) <= 1e-5 * float(expected.x_hat.norm())
