"""sparsify (EleutherAI; also SAE Made Easy's multimodal-sae): ``cfg.json`` + ``sae.safetensors``.

Tensors: encoder.weight [F, D], encoder.bias, W_dec [F, D], b_dec. encode = topk(relu((x - b_dec) encoder^T + bias)).
"""

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json, read_tensors, take
from shared.sae.formats.raw import RawSAE

CONFIG, WEIGHTS = "cfg.json", "sae"
# Options that change the function, and the value that leaves it a plain TopK SAE.
PLAIN = {"activation": "topk", "signed": False, "transcode": False, "skip_connection": False}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for transcoders, skip connections, signed latents and GroupMax."""
    cfg = read_json(folder / CONFIG)
    for name, plain in PLAIN.items():
        if cfg.get(name, plain) != plain:
            raise GranaryError(f"{folder} has {name}={cfg[name]}: plain TopK SAEs alone can be read")
    d = cfg["d_in"]
    f = cfg.get("num_latents") or d * cfg["expansion_factor"]
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = take(read_tensors(folder, WEIGHTS), shapes, folder)
    layer = re.search(r"(?:^|\.)layers\.(\d+)$", folder.name)  # the folder is named after the module, its output
    return RawSAE(
        W_enc_FD,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        k=cfg["k"],
        pre_bias=True,
        provenance={
            "converted_from": "sparsify",
            "source": cfg,
            **({"hook": f"layers.{layer[1]}.resid_post"} if layer else {}),
        },
    )


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for layer_norm."""
    raw = raw.expressed_in("sparsify", ("topk",)).without_layer_norm("sparsify").with_pre_bias(True)
    f, d = raw.W_enc_FD.shape
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, f // d),
        "normalize_decoder": True,
        "num_latents": f,
        "k": raw.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": d,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": raw.W_enc_FD,
        "encoder.bias": raw.b_enc_F,
        "W_dec": raw.W_dec_FD,
        "b_dec": raw.b_dec_D,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{WEIGHTS}.safetensors")
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")
