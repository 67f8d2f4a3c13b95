"""Llamascopium's mixtures of linear transforms: latents and output are those of its formula, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import MoLT, load
from shared.sae.loading import load_any
from tests.foreign_transcoders import MOLT_RANKS as RANKS
from tests.foreign_transcoders import D, K, write_llamascopium


def formula(cfg: dict[str, Any], tensors: dict[str, Tensor], x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, norms of the transforms, output."""
    of = {name: tensor.double() for name, tensor in tensors.items()}
    scaled = cfg["norm_activation"] == "dataset-wise"
    c, e = (D**0.5 / 9, D**0.5 / 4) if scaled else (1.0, 1.0)
    x_ND = x_ND.double() * c
    maps = torch.cat([torch.bmm(of[f"U_matrices.{rank}"], of[f"V_matrices.{rank}"]) for rank in sorted(RANKS)])
    norm_F = maps.flatten(1).norm(dim=1)
    m_F = norm_F if cfg["sparsity_include_decoder_norm"] else torch.ones(6).double()
    z_NF = (x_ND @ of["W_E"] + of["b_E"]) * m_F
    if cfg["act_fn"] == "jumprelu":
        f_NF = z_NF * (z_NF > of["activation_function.log_jumprelu_threshold"].exp())
    elif cfg["act_fn"] == "topk":
        f_NF = torch.zeros_like(z_NF).scatter(1, z_NF.topk(K).indices, 1.0) * torch.relu(z_NF)
    else:
        f_NF = torch.relu(z_NF)
    y_ND = torch.einsum("nf,fed,nd->ne", f_NF / m_F, maps, x_ND) + of["b_D"]
    return f_NF, norm_F, y_ND / e


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("given", [{}, {"sparsity_include_decoder_norm": False}, {"norm_activation": "inference"}])
def test_latents_and_output_are_those_of_the_formula(tmp_path: Path, act_fn: str, given: dict[str, Any]) -> None:
    cfg, tensors = write_llamascopium(tmp_path / "theirs", act_fn=act_fn, **given)
    made = load(tmp_path / "theirs")
    assert isinstance(made, MoLT)
    assert str(made.sites) == "layers.2.mlp_in -> layers.2.mlp_out"
    x_ND = torch.randn(50, D, generator=torch.Generator().manual_seed(1)) * 3
    f_NF, _, y_ND = formula(cfg, tensors, x_ND)
    torch.testing.assert_close(made(x_ND).x_hat.double(), y_ND, rtol=1e-4, atol=1e-4)
    order = [4, 0, 1, 5, 2, 3]  # ours: two blocks of a rank of 3 and two of 1; theirs by ascending rank
    torch.testing.assert_close(made.encode(x_ND).to_dense(6).double(), f_NF[:, order], rtol=1e-4, atol=1e-4)
    if cfg["sparsity_include_decoder_norm"]:
        torch.testing.assert_close(made.transform_norms().detach(), torch.ones(6))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sae_type": "lorsa"}, "has sae_type=lorsa: the molts of Llamascopium can be read"),
        ({"act_fn": "batchtopk"}, "has act_fn=batchtopk: .* do not depend on other tokens can be read"),
        ({"rank_counts": {"x": 2}}, "a number of transforms for each rank"),
        ({"rank_counts": {"1": 4, "3": 3}}, "has shape"),
        ({"hook_point_in": "blocks.3.hook_mlp_in"}, "does not say the mean norms"),
        ({"rotation": True}, "the key rotation, which this reader does not know"),
    ],
)
def test_what_can_not_be_read_is_one_line(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    write_llamascopium(tmp_path / "theirs", **given)
    with pytest.raises(GranaryError, match=told):
        load_any(tmp_path / "theirs")
