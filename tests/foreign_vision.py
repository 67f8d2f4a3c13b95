"""Folders of SAE Made Easy, saev and ViT-Prisma as those projects lay them out, and what their code computes."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.foreign import foreign_weights
from tests.formulas import D, F, K, topk

MODULE = "model.layers.1.mlp.down_proj"


def write_sae_made_easy(folder: Path, modules: tuple[str, ...] = (MODULE,), *, scale: float = 1.0, **more: Any) -> None:
    """As PEFT's save_pretrained of its adapter; with a small `scale` few pre-activations are positive."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "TOPK_SAE", "auto_mapping": None, "base_model_name_or_path": "tiny", "revision": None,
        "task_type": None, "inference_mode": True, "expansion_factor": 8, "num_latents": 0, "k": K,
        "target_modules": list(modules), "dead_tokens_threshold": 10_000_000, **more,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    w, tensors = foreign_weights(), {}
    for number, module in enumerate(modules):
        begin = f"base_model.model.{module}."
        tensors[f"{begin}sae_encoder.weight"] = w["encoder.weight"] * (number + 1) - (1 - scale) * 3
        tensors[f"{begin}sae_W_dec"] = w["W_dec"].clone()
        tensors[f"{begin}sae_b_dec"] = w["b_dec"] * scale
    save_file(tensors, folder / "adapter_model.safetensors")


def sae_made_easy(folder: Path, x: Tensor, module: str = MODULE) -> tuple[Tensor, Tensor]:
    """Dense latents and the reconstruction."""
    w, begin = load_file(folder / "adapter_model.safetensors"), f"base_model.model.{module}.sae_"
    f = signed_topk((x - w[f"{begin}b_dec"]) @ w[f"{begin}encoder.weight"].T)
    return f, f @ w[f"{begin}W_dec"] + w[f"{begin}b_dec"]


def signed_topk(pre: Tensor) -> Tensor:
    """Dense: the k largest as they are, the rest 0."""
    values, indices = pre.topk(K, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, indices, values)


def write_saev(folder: Path, name: str = "Relu", schema: int | None = 5, *, threshold: float | None = None) -> None:
    """A checkpoint of the schema; None: from before there were any."""
    folder.mkdir(parents=True)
    w, f = foreign_weights(), F if schema is not None and schema > 2 else F // D * D
    tensors = {"W_enc": w["encoder.weight"][:f].T.contiguous(), "b_enc": w["encoder.bias"][:f], "W_dec": w["W_dec"][:f],
               "b_dec": w["b_dec"]}  # fmt: skip
    if threshold is not None:
        tensors["activation.threshold"] = torch.tensor(threshold)
    params: dict[str, Any] = {} if name == "Relu" else {"top_k": K}
    common = {"remove_parallel_grads": True, "normalize_w_dec": True}
    header: dict[str, Any] = {"schema": schema, "commit": "unknown", "lib": "0.1.0"}
    if schema is None:
        header = {"d_vit": D, "exp_factor": F // D, "n_reinit_samples": 4, "sparsity_coeff": 4e-4, "ghost_grads": False,
                  "seed": 1, **common}  # fmt: skip
    elif schema == 1:
        header |= {"cls": name, "cfg": {"d_vit": D, "exp_factor": F // D, "seed": 1, **common, **params}}
    else:
        width = {"d_vit": D, "exp_factor": F // D, "seed": 1} if schema == 2 else {"d_model": D, "d_sae": F}
        if schema == 5:
            params |= {"key": name.lower(), "sparsity": {"cls": "NoSparsity", "params": {}}, "aux": None}
            common |= {"reinit_blend": 0.8, "reinit_enc_dec_tranpose": True}
        header["cfg"] = {**width, **common, "activation": {"cls": name, "params": params}}
    write_saev_file(folder / "sae.pt", header, tensors)


def write_saev_file(path: Path, header: Any, tensors: dict[str, Any]) -> None:
    """A line of JSON, and behind it what torch saves."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path.write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())


def read_saev_file(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Both parts."""
    line, _, rest = path.read_bytes().partition(b"\n")
    return json.loads(line), dict(torch.load(io.BytesIO(rest), weights_only=True))


def saev(folder: Path, x: Tensor, name: str = "Relu", *, pre_bias: bool = False) -> tuple[Tensor, Tensor]:
    """Dense latents and the reconstruction."""
    _, w = read_saev_file(folder / "sae.pt")
    z = (x - w["b_dec"] * pre_bias) @ w["W_enc"] + w["b_enc"]
    f = {
        "Relu": lambda: z.relu(),
        "TopK": lambda: signed_topk(z),
        "BatchTopK": lambda: z * (z > w["activation.threshold"].clamp_min(0)),
    }[name]()
    return f, f @ w["W_dec"] + w["b_dec"]


def write_prisma(folder: Path, **changes: Any) -> None:
    """A hub folder: the dataclass as JSON, and the tensors by themselves."""
    folder.mkdir(parents=True)
    config = {
        "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}, "d_in": D, "d_sae": F,
        "normalize_activations": "none", "hook_point_layer": 9, "layer_subtype": "hook_resid_post",
        "hook_point_head_index": None, "is_transcoder": False, "expansion_factor": F // D, "cls_token_only": False,
        "device": {"__type__": "torch.device", "value": "cuda"}, "lr": 1e-3,
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"}, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    w = foreign_weights()
    tensors = {"W_enc": w["encoder.weight"].T.contiguous(), "b_enc": w["encoder.bias"], "W_dec": w["W_dec"],
               "b_dec": w["b_dec"]}  # fmt: skip
    if config["architecture"] == "gated":
        tensors |= {"b_gate": w["encoder.bias"] - 1, "r_mag": w["r_mag"] / 3, "b_mag": w["b_mag"]}
    torch.save(tensors, folder / "n_images_2600058.pt")


def prisma(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense latents and the reconstruction."""
    cfg = json.loads((folder / "config.json").read_text())
    w = torch.load(folder / "n_images_2600058.pt", weights_only=True)
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    given = x - w["b_dec"]
    if cfg["architecture"] == "gated":
        is_open = given @ w["W_enc"] + w["b_gate"] > 0
        f = is_open * (given @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    else:
        z = given @ w["W_enc"] + w["b_enc"]
        f = topk(z) if cfg["activation_fn_str"] == "topk" else z.relu()
    y = f @ w["W_dec"] + w["b_dec"]
    return f, y * std + mean if cfg["normalize_activations"] == "layer_norm" else y
