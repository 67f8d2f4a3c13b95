"""What a dictionary declares of its tensors."""

from typing import Any

import pytest

from shared.sae import SAE, SAEConfig

CASES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "jumprelu": {},
    "gated": {},
    "relu": {"unit_norm_decoder": False},
}


@pytest.mark.parametrize("activation", CASES)
def test_every_tensor_has_a_role_and_a_latent_axis_as_long_as_there_are_latents(activation: str) -> None:
    sae = SAE(SAEConfig(d_model=7, d_latent=30, activation=activation, **CASES[activation]))
    tensors, roles = sae.state_dict(), sae.roles()
    assert roles.keys() == tensors.keys()
    for name, role in roles.items():
        if role.latent_axis is None:
            assert 30 not in tensors[name].shape, name
        else:
            assert tensors[name].shape[role.latent_axis] == 30, name
    unit_rows = {name for name, role in roles.items() if role.unit_rows}
    assert unit_rows == ({"W_dec"} if sae.config.unit_norm_decoder else set())
    fixed = {name for name, role in roles.items() if not role.learnt}
    assert fixed == {"input_mean", "input_scale", "input_variance"}
