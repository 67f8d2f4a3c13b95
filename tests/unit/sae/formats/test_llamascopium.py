"""Llamascopium's mixtures of linear transforms and Lorsas: latents and output are those of its formula, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae import Lorsa, MoLT, load
from shared.sae.loading import load_any
from shared.sae.sites import Sites
from tests.foreign_transcoders import MOLT_RANKS as RANKS
from tests.foreign_transcoders import D, K, write_llamascopium, write_llamascopium_lorsa


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
        ({"sae_type": "clt"}, "has sae_type=clt: the molts and lorsas of Llamascopium can be read"),
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


def turned(cfg: dict[str, Any], x_CTHE: Tensor) -> Tensor:
    """Their rotation, by the angles of their settings: adjacent pairs of features, or halves."""
    size = cfg["rotary_dim"]
    base = torch.tensor(float(cfg["rotary_base"])).double()
    turns = [base ** (-2 * pair / size) for pair in range(size // 2)]
    if cfg["use_NTK_by_parts_rope"]:
        old, factor = cfg["old_context_len"], cfg["NTK_by_parts_factor"]
        low, high = cfg["NTK_by_parts_low_freq_factor"], cfg["NTK_by_parts_high_freq_factor"]
        for pair, turn in enumerate(turns):
            length = 2 * torch.pi / turn
            smooth = (old / length - low) / (high - low)
            if length > old / low:
                turns[pair] = turn / factor
            elif not length < old / high:
                turns[pair] = (1 - smooth) * turn / factor + smooth * turn
    made = x_CTHE.clone()
    for t in range(x_CTHE.shape[1]):
        for pair, turn in enumerate(turns):
            one, two = (2 * pair, 2 * pair + 1) if cfg["rotary_adjacent_pairs"] else (pair, pair + size // 2)
            cos, sin = torch.cos(t * turn), torch.sin(t * turn)
            made[:, t, :, one] = x_CTHE[:, t, :, one] * cos - x_CTHE[:, t, :, two] * sin
            made[:, t, :, two] = x_CTHE[:, t, :, two] * cos + x_CTHE[:, t, :, one] * sin
    return made


def lorsa_formula(cfg: dict[str, Any], tensors: dict[str, Tensor], x_CTD: Tensor) -> tuple[Tensor, Tensor]:
    """Latents times the norm of their output row, and what is written."""
    of = {name: tensor.double() for name, tensor in tensors.items()}
    c, e = (D**0.5 / 9, D**0.5 / 4) if cfg["norm_activation"] == "dataset-wise" else (1.0, 1.0)
    x_CTD = x_CTD.double() * c
    copies = cfg["n_qk_heads"] // len(of["W_Q"])
    sides = []
    for which in "QK":
        rows = torch.einsum("ctd,hde->cthe", x_CTD, of[f"W_{which}"]) + of[f"b_{which}"]
        if cfg["use_post_qk_ln"]:
            rows = rows / (rows.square().mean(-1, keepdim=True) + cfg["eps"]).sqrt() * of[f"ln_{which.lower()}.w"]
        sides.append(turned(cfg, rows) if cfg["positional_embedding_type"] == "rotary" else rows)
    q, k = (rows.repeat_interleave(copies, 2) for rows in sides)
    scores = torch.einsum("cqhe,ckhe->chqk", q, k) / (cfg["attn_scale"] or cfg["d_qk_head"] ** 0.5)
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    A = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
    v = x_CTD @ of["W_V"].T + of["b_V"]
    z = torch.einsum("chqk,ckhl->cqhl", A, v.unflatten(2, (cfg["n_qk_heads"], -1))).flatten(2)
    m = of["W_O"].norm(dim=1) if cfg["sparsity_include_decoder_norm"] else torch.ones(z.shape[2]).double()
    if cfg["act_fn"] == "jumprelu":
        f = (z * m) * (z * m > of["activation_function.log_jumprelu_threshold"].exp())
    else:
        kept = torch.zeros_like(z).scatter(2, (z * m).topk(K, dim=2).indices, 1.0)
        f = torch.relu(z * m) * (kept if cfg["act_fn"] == "topk" else 1)
    return f, ((f / m) @ of["W_O"] + of["b_D"]) / e


LORSAS: list[dict[str, Any]] = [
    {},
    {"act_fn": "topk", "rotary_adjacent_pairs": False, "attn_scale": 3.0},
    {"act_fn": "relu", "norm_activation": "inference", "positional_embedding_type": "none"},
    {"use_post_qk_ln": True, "normalization_type": "RMS", "sparsity_include_decoder_norm": False, "rotary_dim": 4},
    {"use_NTK_by_parts_rope": True, "heads_in_file": 2, "hook_point_in": "blocks.2.hook_resid_mid"},
]


@pytest.mark.parametrize("given", LORSAS, ids=str)
def test_a_lorsa_is_that_of_the_formula(tmp_path: Path, given: dict[str, Any]) -> None:
    cfg, tensors = write_llamascopium_lorsa(tmp_path / "theirs", **given)
    made = load(tmp_path / "theirs")
    assert isinstance(made, Lorsa)
    known = "hook_point_in" in given  # what their norms leave with or without a weight has no one name here
    assert made.sites == (Sites(("layers.2.resid_mid",), ("layers.2.attn_out",), "sequence") if known else None)
    x_CTD = torch.randn(3, 8, D, generator=torch.Generator().manual_seed(1)) * 3
    f_CTF, y_CTD = lorsa_formula(cfg, tensors, x_CTD)
    torch.testing.assert_close(made.encode(x_CTD).to_dense(f_CTF.shape[2]).double(), f_CTF, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made(x_CTD).x_hat.double(), y_CTD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rotary_scale": 2}, "rotary_scale=2: a lorsa of rotary_scale=1 can be read"),
        ({"use_post_qk_ln": True, "normalization_type": "LN"}, "normalization_type=LN: a lorsa whose queries and keys"),
        ({"attn_scale": 0.0}, "attn_scale=0.0, which is not above 0"),
        ({"n_qk_heads": 6, "heads_in_file": 4}, "W_Q has 4 heads, of which n_qk_heads=6 is no multiple"),
        ({"rotary_base": 500, "kept_base": 10_000}, "rotary_cos is not what the settings of the rotation say"),
        ({"gate": True}, "the key gate, which this reader does not know"),
    ],
)
def test_a_lorsa_that_can_not_be_read_is_one_line(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    write_llamascopium_lorsa(tmp_path / "theirs", **given)
    with pytest.raises(GranaryError, match=told):
        load_any(tmp_path / "theirs")
