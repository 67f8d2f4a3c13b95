"""Folders as other projects lay them out, with weights that no convention was used to make."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formulas import D, F, K


def foreign_weights() -> dict[str, Tensor]:
    """Decoder rows of any length, biases and thresholds everywhere."""
    generator = torch.Generator().manual_seed(5)
    names = {
        "encoder.weight": (F, D),
        "encoder.bias": (F,),
        "W_dec": (F, D),
        "b_dec": (D,),
        "r_mag": (F,),
        "b_mag": (F,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    return weights | {"threshold": torch.rand(F, generator=generator) * 40}


def write_opensae(folder: Path, *, normalise: bool, shift_back: bool, shards: bool, **more: Any) -> None:
    """As OpenSAE's released SAEs, whole or in two shards."""
    folder.mkdir()
    config = {
        "activation": "topk",
        "architectures": ["OpenSae"],
        "feature_size": F,
        "hidden_size": D,
        "input_hookpoint": "layers.25",
        "output_hookpoint": "layers.25",
        "input_normalize": normalise,
        "input_normalize_eps": 1e-5,
        "k": K,
        "multi_topk": 4,
        "normalize_shift_back": shift_back,
        "torch_dtype": "float32",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: foreign_weights()[name] for name in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")}
    if not shards:
        save_file(weights, folder / "model.safetensors")
        return
    files = {"model-00001-of-00002.safetensors": ["W_dec", "b_dec"]}
    files["model-00002-of-00002.safetensors"] = ["encoder.weight", "encoder.bias"]
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_saelens(folder: Path, architecture: str = "topk", **changes: Any) -> None:
    """As SAELens writes `architecture`; `changes` are keys of its cfg.json."""
    folder.mkdir()
    given = foreign_weights()
    weights = {"W_enc": given["encoder.weight"].T.contiguous(), "W_dec": given["W_dec"], "b_dec": given["b_dec"]}
    weights["b_gate" if architecture == "gated" else "b_enc"] = given["encoder.bias"]
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_pre", "sae_lens_version": "6.54.12"},
    }
    if architecture in ("topk", "batchtopk"):
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        weights["threshold"] = given["threshold"]
    if architecture == "batchtopk":
        weights["topk_threshold"] = torch.tensor(15.0, dtype=torch.float64)
    if architecture == "gated":
        weights |= {"r_mag": given["r_mag"], "b_mag": given["b_mag"]}
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**cfg, **changes}))


def write_dictionary_learning(folder: Path, dict_class: str) -> None:
    """As dictionary_learning's trainers leave a run."""
    folder.mkdir()
    w = foreign_weights()
    linear = {"encoder.weight": w["encoder.weight"], "decoder.weight": w["W_dec"].T.contiguous()}
    matrices = {"W_enc": w["encoder.weight"].T.contiguous(), "b_enc": w["encoder.bias"], "W_dec": w["W_dec"]}
    picks = {"b_dec": w["b_dec"], "k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(15.0)}
    tensors = {
        "AutoEncoder": linear | {"encoder.bias": w["encoder.bias"], "bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"encoder.bias": w["encoder.bias"], "decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": linear | {"encoder.bias": w["encoder.bias"], **picks},
        "BatchTopKSAE": linear | {"encoder.bias": w["encoder.bias"], **picks},
        "MatryoshkaBatchTopKSAE": matrices | picks | {"group_sizes": torch.tensor([10, F - 10])},
        "JumpReluAutoEncoder": matrices | {"b_dec": w["b_dec"], "threshold": w["threshold"]},
        "GatedAutoEncoder": linear
        | {"decoder_bias": w["b_dec"], "gate_bias": w["encoder.bias"], "r_mag": w["r_mag"], "mag_bias": w["b_mag"]},
    }[dict_class]
    torch.save(tensors, folder / "ae.pt")
    trainer = {"dict_class": dict_class, "lm_name": "tiny", "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))


def write_llama_scope(folder: Path, **changes: Any) -> None:
    """As fnlp/Llama3_1-8B-Base-LXR-8x has them."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "act_fn": "jumprelu",
        "apply_decoder_bias_to_pre_encoder": False,
        "d_model": D,
        "d_sae": F,
        "dataset_average_activation_norm": {"in": 31.0, "out": 31.0},
        "hook_point_in": "blocks.8.hook_resid_post",
        "hook_point_out": "blocks.8.hook_resid_post",
        "jump_relu_threshold": 20.2,
        "norm_activation": "dataset-wise",
        "top_k": 50,
        "use_decoder_bias": True,
        **changes,
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    w = foreign_weights()
    tensors = {
        "encoder.weight": w["encoder.weight"],
        "encoder.bias": w["encoder.bias"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder.bias": w["b_dec"],
    }
    save_file(tensors, folder / "checkpoints" / "final.safetensors")


def write_gemma_scope(folder: Path, version: int, **extra: Tensor) -> None:
    """As google/gemma-scope-2b-pt-res (1) and google/gemma-scope-2-* (2) have them."""
    folder.mkdir(parents=True)
    w = foreign_weights()
    tensors = {
        "W_enc": w["encoder.weight"].T.contiguous(),
        "b_enc": w["encoder.bias"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
        "threshold": w["threshold"],
        **extra,
    }
    place = "model.layers.9.output"
    save_gemma_scope(folder, version, tensors, {"hf_hook_point_in": place, "hf_hook_point_out": place})


def save_gemma_scope(folder: Path, version: int, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The files of either version, of tensors by the first one's names; the first has no config."""
    if version == 1:
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
        return
    lower = {name.replace("W_", "w_"): tensor for name, tensor in tensors.items()}
    save_file(lower, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
