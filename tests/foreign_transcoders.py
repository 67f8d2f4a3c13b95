"""Other projects' transcoders and crosscoders: folders as they lay them out, and their formulas in float64.

Each formula reads a folder and returns (dense latents [N, F], what is written [N, D_out]) of activations x [N, D_in].
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.foreign import save_gemma_scope

D, F, K, SITES = 8, 20, 4, 2
D_OUT = 6
MOLT_RANKS = {1: 4, 3: 2}
SAELENS = {
    "transcoder": ("transcoder", "relu"),
    "skip_transcoder": ("skip_transcoder", "relu"),
    "jumprelu_transcoder": ("transcoder", "jumprelu"),
    "jumprelu_skip_transcoder": ("skip_transcoder", "jumprelu"),
}
"""Kind and activation by SAELens's architecture."""


def tokens(width: int, rows: int = 200) -> Tensor:
    """Rows of unequal scales, [N, width]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator) * torch.linspace(0.5, 4, width) + 1


def weights(d_in: int, d_out: int) -> dict[str, Tensor]:
    """One row per latent; W_skip [d_out, d_in]."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (F, d_in), "b_enc": (F,), "W_dec": (F, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | {"threshold": torch.rand(F, generator=generator) * 8}


def write_saelens(folder: Path, architecture: str, **changes: Any) -> None:
    """As SAELens saves a transcoder of `architecture`; `changes` are keys of its cfg.json."""
    folder.mkdir()
    w = weights(D, D_OUT)
    tensors = {"W_enc": w["W_enc"].T.contiguous(), "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    kind, activation = SAELENS[architecture]
    tensors |= {"W_skip": w["W_skip"]} if kind == "skip_transcoder" else {}
    tensors |= {"threshold": w["threshold"]} if activation == "jumprelu" else {}
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = {
        "architecture": architecture,
        "d_in": D,
        "d_out": D_OUT,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"},
        **changes,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))


def write_sparsify(folder: Path, *, skip: bool, **changes: Any) -> None:
    """As sparsify saves a transcoder."""
    folder.mkdir()
    w = weights(D, D)
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file(tensors | ({"W_skip": w["W_skip"]} if skip else {}), folder / "sae.safetensors")
    cfg = {"d_in": D, "num_latents": F, "k": K, "transcode": True, "skip_connection": skip, **changes}
    (folder / "cfg.json").write_text(json.dumps(cfg))


def write_gemma_scope(folder: Path, version: int, *, skip: bool = False) -> None:
    """As google/gemma-scope-2b-pt-transcoders (1) and the transcoders of google/gemma-scope-2-* (2)."""
    folder.mkdir(parents=True)
    w = weights(D, D)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    tensors = {name: w[name].T.contiguous() if name == "W_enc" else w[name] for name in names}
    tensors |= {"affine_skip_connection": w["W_skip"].T.contiguous()} if skip else {}
    layer = "model.layers.9"
    config = {
        "model_name": "gemma-v3-270m",
        "hf_hook_point_in": f"{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{layer}.post_feedforward_layernorm.output",
        "affine_connection": skip,
    }
    save_gemma_scope(folder, version, tensors, config)


def write_crosscoder(folder: Path, code: int, *, normalised: bool, batchtopk: bool = True, hub: bool = False) -> None:
    """As crosscoder_learning's trainer leaves a run, or its hub's folder."""
    folder.mkdir()
    w = weights(SITES * D, SITES * D)
    generator = torch.Generator().manual_seed(6)
    mean, std = torch.randn(SITES, D, generator=generator), torch.rand(SITES, D, generator=generator) + 0.5
    tensors = {
        "encoder.weight": w["W_enc"].view(F, SITES, D).permute(1, 2, 0).contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].view(F, SITES, D).transpose(0, 1).contiguous(),
        "decoder.bias": w["b_dec"].view(SITES, D),
        "code_normalization_id": torch.tensor(code),
        "activation_mean": mean if normalised else torch.full((SITES, D), torch.nan),
        "activation_std": std if normalised else torch.full((SITES, D), torch.nan),
        "activation_global_scale": 1.5 / std.square().sum(1).sqrt() if normalised else torch.ones(SITES),
        "target_rms": torch.tensor(1.5),
    }
    if batchtopk:
        tensors |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor([9.0, 4.0][normalised])}
    if hub:
        save_file(tensors, folder / "model.safetensors")
        config = {"activation_dim": D, "dict_size": F, "num_layers": SITES, "code_normalization": "SAE"}
        (folder / "config.json").write_text(json.dumps(config))
        return
    torch.save(tensors, folder / "final.pt")
    name = "BatchTopKCrossCoder" if batchtopk else "CrossCoder"
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "lr": 1e-4}, "buffer": {}}))


def largest(z_NF: Tensor) -> Tensor:
    """The k largest of relu(z), the rest 0."""
    values, indices = z_NF.relu().topk(K, dim=-1)
    return torch.zeros_like(z_NF).scatter_(-1, indices, values)


def saelens(folder: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """SAELens's transcoders; what ``forward`` gives, the skip in it."""
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    assert json.loads((folder / "cfg.json").read_text())["architecture"] in SAELENS
    z_NF = x_ND.double() @ w["W_enc"] + w["b_enc"]
    f_NF = z_NF.relu() * (z_NF > w["threshold"]) if "threshold" in w else z_NF.relu()
    y_ND = f_NF @ w["W_dec"] + w["b_dec"]
    return f_NF, y_ND + x_ND.double() @ w["W_skip"].T if "W_skip" in w else y_ND


def sparsify(folder: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """sparsify's transcoders."""
    assert json.loads((folder / "cfg.json").read_text())["transcode"]
    w = {name: tensor.double() for name, tensor in load_file(folder / "sae.safetensors").items()}
    f_NF = largest(x_ND.double() @ w["encoder.weight"].T + w["encoder.bias"])
    y_ND = f_NF @ w["W_dec"] + w["b_dec"]
    return f_NF, y_ND + x_ND.double() @ w["W_skip"].T if "W_skip" in w else y_ND


def gemma_scope(x_ND: Tensor, *, skip: bool) -> tuple[Tensor, Tensor]:
    """Gemma Scope's transcoders, of the weights that ``write_gemma_scope`` writes."""
    w = {name: tensor.double() for name, tensor in weights(D, D).items()}
    z_NF = x_ND.double() @ w["W_enc"].T + w["b_enc"]
    f_NF = z_NF.relu() * (z_NF > w["threshold"])
    y_ND = f_NF @ w["W_dec"] + w["b_dec"]
    return f_NF, y_ND + x_ND.double() @ w["W_skip"].T if skip else y_ND


def write_llamascopium(folder: Path, **given: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A MoLT as Llamascopium saves one on one device; its settings and weights."""
    reads, writes = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
    cfg = {
        "sae_type": "molt", "d_model": D, "expansion_factor": 0.75, "use_decoder_bias": True, "act_fn": "jumprelu",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K,
        "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0, "hook_point_in": reads, "hook_point_out": writes,
        "rank_counts": {str(rank): count for rank, count in MOLT_RANKS.items()}, **given,
    }  # fmt: skip
    generator, latents = torch.Generator().manual_seed(0), sum(MOLT_RANKS.values())
    shapes: dict[str, tuple[int, ...]] = {"W_E": (D, latents), "b_E": (latents,), "b_D": (D,)}
    for rank, count in MOLT_RANKS.items():
        shapes |= {f"U_matrices.{rank}": (count, D, rank), f"V_matrices.{rank}": (count, rank, D)}
    if cfg["act_fn"] == "jumprelu":
        shapes["activation_function.log_jumprelu_threshold"] = (latents,)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(n) for hook, n in ((reads, 9.0), (writes, 4.0))}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(tensors | norms, folder / "sae_weights.safetensors")
    return cfg, tensors


def write_llamascopium_lorsa(folder: Path, **given: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A Lorsa as Llamascopium saves one on one device; its settings and weights."""
    heads, width, latents, length = 4, 6, 12, 16
    reads, writes = "blocks.2.ln1.hook_normalized", "blocks.2.hook_attn_out"
    in_file, kept_base = given.pop("heads_in_file", heads), given.pop("kept_base", None)
    cfg = {
        "sae_type": "lorsa", "d_model": D, "expansion_factor": latents / D, "use_decoder_bias": True,
        "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K,
        "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0, "hook_point_in": reads, "hook_point_out": writes, "n_qk_heads": heads,
        "d_qk_head": width, "positional_embedding_type": "rotary", "rotary_dim": width, "rotary_base": 100,
        "rotary_adjacent_pairs": True, "rotary_scale": 1, "use_NTK_by_parts_rope": False, "NTK_by_parts_factor": 8.0,
        "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 4.0, "old_context_len": 16,
        "n_ctx": length, "attn_scale": None, "use_post_qk_ln": False, "normalization_type": None, "eps": 1e-6, **given,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"W_V": (latents, D), "W_O": (latents, D), "b_V": (latents,), "b_D": (D,)}
    for which in "QK":
        shapes |= {f"W_{which}": (in_file, D, width), f"b_{which}": (in_file, width)}
        if cfg["use_post_qk_ln"]:
            shapes[f"ln_{which.lower()}.w"] = (in_file, width)
    if cfg["act_fn"] == "jumprelu":
        shapes["activation_function.log_jumprelu_threshold"] = (latents,)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scaled = ((cfg["hook_point_in"], 9.0), (writes, 4.0))
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(n) for hook, n in scaled}
    kept = {"mask": torch.ones(length, length).bool().tril(), "IGNORE": torch.tensor(-torch.inf)}
    if cfg["positional_embedding_type"] == "rotary" and not cfg["use_NTK_by_parts_rope"]:
        base, size = kept_base or cfg["rotary_base"], cfg["rotary_dim"]
        angles = torch.arange(length)[:, None] / base ** (torch.arange(size // 2) / (size / 2))
        angles = angles.repeat_interleave(2, 1) if cfg["rotary_adjacent_pairs"] else torch.cat([angles, angles], 1)
        kept |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(tensors | norms | kept, folder / "sae_weights.safetensors")
    return cfg, tensors


def crosscoder_learning(folder: Path, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """crosscoder_learning's CrossCoder and BatchTopKCrossCoder; sites side by side."""
    pickled = folder / "final.pt"
    loaded = torch.load(pickled, weights_only=True) if pickled.exists() else load_file(folder / "model.safetensors")
    w = {name: tensor.double() for name, tensor in loaded.items()}
    sites, d, f = w["encoder.weight"].shape
    x_NKD = x_ND.double().view(-1, sites, d)
    mean, scale = w["activation_mean"], w["activation_global_scale"][:, None]
    is_normalised = not mean.isnan().any()
    given_NKD = (x_NKD - mean) * scale if is_normalised else x_NKD
    f_NF = torch.relu(torch.einsum("nkd,kdf->nf", given_NKD, w["encoder.weight"]) + w["encoder.bias"])
    if "threshold" in w:
        norm_KF = w["decoder.weight"].norm(dim=2)
        joint, total = norm_KF.norm(dim=0), norm_KF.sum(0)
        by_code = {1: total, 2: joint, 3: joint + 0.1 * total, 4: torch.ones(f)}
        f_NF = f_NF * (f_NF * by_code[int(w["code_normalization_id"])] > w["threshold"])
    y_NKD = torch.einsum("nf,kfd->nkd", f_NF, w["decoder.weight"]) + w["decoder.bias"]
    return f_NF, (y_NKD / (scale + 1e-8) + mean if is_normalised else y_NKD).flatten(1)
