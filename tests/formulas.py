"""Other projects' formats as their documentation has them, in dense float32 arithmetic and without this project's code.

Each formula reads a folder and returns (dense latents [N, F], reconstruction [N, D]) of activations x [N, D].
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.sae import SAE
from tests.learning import LearningSAE

D, F, K, N = 12, 40, 5, 64
PROVENANCE = {"hook": "layers.3.resid_post", "model": {"id": "tiny"}, "seq_len": 128}
ACTIVATIONS = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")
NORMALISATIONS = ("none", "scale", "centre_scale", "layer_norm")

Formula = Callable[[Path, Tensor], tuple[Tensor, Tensor]]


def activations() -> Tensor:
    """Rows with a large mean and one huge dimension, as residual streams have them."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 3 + torch.linspace(-4, 9, D)
    x[:, 2] *= 30
    return x


def make_sae(activation: str, normalisation: str, pre_bias: bool) -> SAE:
    """An SAE of this project whose parameters are all of consequence."""
    sae = LearningSAE(
        d_model=D,
        d_latent=F,
        k=K if activation in ("topk", "batchtopk", "matryoshka") else None,
        activation="batchtopk" if activation == "matryoshka" else activation,
        prefixes=(10, F) if activation == "matryoshka" else None,
        normalisation=normalisation,
        pre_bias=pre_bias,
        generator=torch.Generator().manual_seed(1),
    ).requires_grad_(False)
    sae.initialise(None, activations())
    generator = torch.Generator().manual_seed(2)
    sae.b_enc.copy_(torch.randn(F, generator=generator) * 0.3)
    sae.b_dec.add_(torch.randn(D, generator=generator) * 0.3)
    for name, tensor in sae.activation.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.4
        tensor.copy_({"threshold": 0.7 + 0.1 * noise, "log_threshold": noise - 1.5}.get(name, noise))
    return sae


def assert_same(sae: SAE, latents: Tensor, reconstruction: Tensor, x: Tensor) -> None:
    """Relative to the largest entry: weights were folded in another order. And what fires is not trivial."""
    output = sae(x)
    for found, expected in ((output.latents.to_dense(F), latents), (output.x_hat, reconstruction)):
        assert float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    fired = (latents > 0).sum(1)
    if sae.config.activation == "topk":
        assert (fired == K).all()
    else:
        assert fired.min() < fired.max() < F
        assert (latents > 0).any(0).sum() > 2


def topk(pre: Tensor) -> Tensor:
    """Dense latents: the k largest of relu(pre), the rest 0."""
    values, indices = pre.relu().topk(K, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, indices, values)


def above(pre: Tensor, threshold: Tensor) -> Tensor:
    """relu(pre) where pre is above the threshold."""
    return pre.relu() * (pre > threshold)


def saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """SAELens 6."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    given = x - w["b_dec"] * cfg["apply_b_dec_to_input"]
    norm = w["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(F)
    match cfg["architecture"]:
        case "topk":
            f = topk((given @ w["W_enc"] + w["b_enc"]) * norm)
        case "standard":
            f = (given @ w["W_enc"] + w["b_enc"]).relu()
        case "jumprelu":
            f = above(given @ w["W_enc"] + w["b_enc"], w["threshold"])
        case "batchtopk":
            f = above((given @ w["W_enc"] + w["b_enc"]) * norm, w["topk_threshold"].float())
        case "gated":
            is_open = given @ w["W_enc"] + w["b_gate"] > 0
            f = is_open * (given @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    y = (f / norm) @ w["W_dec"] + w["b_dec"]
    return f, y * std + mean if cfg["normalize_activations"] == "layer_norm" else y


def sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """sparsify 1.3."""
    w = load_file(folder / "sae.safetensors")
    f = topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    return f, f @ w["W_dec"] + w["b_dec"]


def dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """dictionary_learning 0.1."""
    w = torch.load(folder / "ae.pt", weights_only=True)
    match json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]:
        case "AutoEncoderTopK":
            f = topk((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
            return f, f @ w["decoder.weight"].T + w["b_dec"]
        case "BatchTopKSAE":
            f = above((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], w["threshold"])
            return f, f @ w["decoder.weight"].T + w["b_dec"]
        case "MatryoshkaBatchTopKSAE":
            f = above((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], w["threshold"])
            return f, f @ w["W_dec"] + w["b_dec"]
        case "AutoEncoder":
            f = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
            return f, f @ w["decoder.weight"].T + w["bias"]
        case "AutoEncoderNew":
            f = (x @ w["encoder.weight"].T + w["encoder.bias"]).relu()
            return f, f @ w["decoder.weight"].T + w["decoder.bias"]
        case "JumpReluAutoEncoder":
            f = above(x @ w["W_enc"] + w["b_enc"], w["threshold"])
            return f, f @ w["W_dec"] + w["b_dec"]
        case "GatedAutoEncoder":
            encoded = (x - w["decoder_bias"]) @ w["encoder.weight"].T
            f = (encoded + w["gate_bias"] > 0) * (w["r_mag"].exp() * encoded + w["mag_bias"]).relu()
            return f, f @ w["decoder.weight"].T + w["decoder_bias"]
    raise AssertionError(folder)


def opensae(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """OpenSAE, as its released SAEs."""
    config = json.loads((folder / "config.json").read_text())
    w: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        w |= load_file(file)
    z = x
    if config["input_normalize"]:
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True) + config["input_normalize_eps"]
        z = (x - mean) / scale
    f = topk((z - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    y = f @ w["W_dec"] + w["b_dec"]
    return f, y * scale + mean if config["normalize_shift_back"] else y


def llama_scope(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Llama Scope: inputs to norm sqrt(d) on average, the threshold in raw units."""
    config, w = (
        json.loads((folder / "hyperparams.json").read_text()),
        load_file(folder / "checkpoints/final.safetensors"),
    )
    scale = math.sqrt(D) / config["dataset_average_activation_norm"]["in"]
    f = above(
        scale * x @ w["encoder.weight"].T + w["encoder.bias"], scale * torch.tensor(config["jump_relu_threshold"])
    )
    return f, (f @ w["decoder.weight"].T + w["decoder.bias"]) / scale


def gemma_scope(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gemma Scope 1 (npz) and 2 (safetensors, lower-case names)."""
    if (folder / "params.npz").is_file():
        w = {name: torch.from_numpy(array) for name, array in np.load(folder / "params.npz").items()}
    else:
        loaded = load_file(folder / "params.safetensors")
        w = {"W" + name[1:] if name.startswith("w_") else name: tensor for name, tensor in loaded.items()}
    f = above(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


FORMULAS: dict[str, Formula] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "opensae": opensae,
    "llama_scope": llama_scope,
    "gemma_scope": gemma_scope,
}
