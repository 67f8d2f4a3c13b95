"""Llamascopium's Lorsas and mixtures of linear transforms, by the package itself: what it computes is what is read."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.sae import Lorsa, MoLT, load
from tests.foreign_transcoders import MOLT_RANKS, D, write_llamascopium, write_llamascopium_lorsa

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    dictionaries = pytest.importorskip(
        "llamascopium.models.sparse_dictionary", reason="llamascopium is not in this environment: make test-peers"
    )
    lorsas = importlib.import_module("llamascopium.models.lorsa")
    importlib.import_module("llamascopium.models.molt")  # which makes the kind known


def theirs(folder: Path) -> Any:
    """In float64, as far as it goes: cosines and sines it keeps in float32."""
    return dictionaries.SparseDictionary.from_pretrained(str(folder)).requires_grad_(False).double()


def ours(folder: Path) -> Any:
    return load(folder).double()


def computes(made: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents times the norm of what they write, where it chooses by that, and what is written, of raw activations."""
    reads, writes = made.cfg.hook_point_in, made.cfg.hook_point_out
    normal, scales = made.normalize_activations({reads: x, writes: torch.zeros_like(x)}, return_scale_factor=True)
    latents = made.encode(normal[reads])
    more = {} if made.cfg.sae_type == "lorsa" else {"original_x": normal[reads]}
    output = made.denormalize_activations({writes: made.decode(latents, **more)}, scales)[writes]
    return latents * made.decoder_norm() if made.cfg.sparsity_include_decoder_norm else latents, output


def contexts() -> Tensor:
    return torch.randn(3, 12, D, generator=torch.Generator().manual_seed(1)).double() * 3


LORSAS: list[dict[str, Any]] = [
    {},
    {"act_fn": "topk", "rotary_adjacent_pairs": False, "attn_scale": 3.0},
    {"act_fn": "relu", "norm_activation": "inference", "positional_embedding_type": "none"},
    {"use_post_qk_ln": True, "normalization_type": "RMS", "sparsity_include_decoder_norm": False, "rotary_dim": 4},
    {"heads_in_file": 2, "hook_point_in": "blocks.2.hook_resid_mid"},
]


@pytest.mark.parametrize("given", LORSAS, ids=str)
def test_a_lorsa(tmp_path: Path, given: dict[str, Any]) -> None:
    write_llamascopium_lorsa(tmp_path / "theirs", **given)
    own, peer, x_CTD = ours(tmp_path / "theirs"), theirs(tmp_path / "theirs"), contexts()
    assert isinstance(own, Lorsa)
    f_CTF, y_CTD = computes(peer, x_CTD)
    latents = own.encode(x_CTD)
    torch.testing.assert_close(latents.to_dense(f_CTF.shape[2]), f_CTF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.decode(latents), y_CTD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own(x_CTD).x_hat, y_CTD, rtol=1e-5, atol=1e-5)
    normal_CTD = peer.normalize_activations({peer.cfg.hook_point_in: x_CTD})[peer.cfg.hook_point_in]
    pattern = peer.encode(normal_CTD, return_attention_pattern=True)[1]
    torch.testing.assert_close(own.patterns(x_CTD), pattern, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("given", [{}, {"sparsity_include_decoder_norm": False}, {"norm_activation": "inference"}])
def test_a_molt(tmp_path: Path, act_fn: str, given: dict[str, Any]) -> None:
    write_llamascopium(tmp_path / "theirs", act_fn=act_fn, **given)
    own, x_ND = ours(tmp_path / "theirs"), contexts().flatten(0, 1)
    assert isinstance(own, MoLT)
    f_NF, y_ND = computes(theirs(tmp_path / "theirs"), x_ND)
    starts = {rank: sum(MOLT_RANKS[less] for less in MOLT_RANKS if less < rank) for rank in MOLT_RANKS}
    order = []
    for rank in own.config.rank_of_each:  # theirs are by ascending rank
        order.append(starts[rank])
        starts[rank] += 1
    latents = own.encode(x_ND)
    torch.testing.assert_close(latents.to_dense(len(order)), f_NF[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.decode(latents), y_ND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own(x_ND).x_hat, y_ND, rtol=1e-5, atol=1e-5)


PARTS = {"use_NTK_by_parts_rope": True, "NTK_by_parts_factor": 8.0, "NTK_by_parts_high_freq_factor": 4.0}


@pytest.mark.parametrize("given", [{}, {"rotary_adjacent_pairs": False, "rotary_dim": 4}, PARTS], ids=str)
def test_a_folder_that_it_writes(tmp_path: Path, given: dict[str, Any]) -> None:
    """A Lorsa that the package made and saved, its cosines and sines in the file."""
    fields = {
        "d_model": D, "expansion_factor": 2, "act_fn": "topk", "top_k": 4, "n_qk_heads": 4, "d_qk_head": 6,
        "rotary_dim": 6, "rotary_base": 100, "old_context_len": 16, "n_ctx": 16,
        "hook_point_in": "blocks.1.hook_resid_mid", "hook_point_out": "blocks.1.hook_attn_out", **given,
    }  # fmt: skip
    config = lorsas.LorsaConfig(**fields)
    made = lorsas.LowRankSparseAttention(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    made.set_dataset_average_activation_norm({config.hook_point_in: 7.0, config.hook_point_out: 3.0})
    made.save_pretrained(tmp_path / "theirs")
    config.save_hyperparameters(tmp_path / "theirs")
    own, x_CTD = ours(tmp_path / "theirs"), contexts()
    f_CTF, y_CTD = computes(theirs(tmp_path / "theirs"), x_CTD)
    torch.testing.assert_close(own.encode(x_CTD).to_dense(2 * D), f_CTF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own(x_CTD).x_hat, y_CTD, rtol=1e-5, atol=1e-5)
