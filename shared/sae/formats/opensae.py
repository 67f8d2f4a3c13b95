"""OpenSAE (THU-KEG): ``config.json`` with architecture OpenSae + ``model.safetensors``, whole or in shards.

Tensors: encoder.weight [F, D], encoder.bias, W_dec [F, D], b_dec. Algorithm of the released SAEs, x of one token:

    z = (x - mean) / (std + eps) - b_dec, std over d - 1;  f = topk(relu(encoder z + bias));  y = sum f W_dec + b_dec

and, with ``normalize_shift_back``, y (std + eps) + mean. The released ones leave that out: they read normalised
activations and reconstruct raw ones, with the same b_dec on both sides. Statistics are taken in float32 here; OpenSAE
takes them in the dtype the activation comes in.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json, read_tensors, take
from shared.sae.formats.raw import RawSAE

CONFIG, WEIGHTS = "config.json", "model"
ARCHITECTURE = "OpenSae"


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    path = folder / CONFIG
    return path.is_file() and ARCHITECTURE in (read_json(path).get("architectures") or [])


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for an activation other than topk and a hook pair of two different places."""
    config = read_json(folder / CONFIG)
    if config.get("activation") != "topk":
        raise GranaryError(f"{folder} has activation={config.get('activation')}: TopK SAEs alone can be read yet")
    place, target = config.get("input_hookpoint"), config.get("output_hookpoint")
    if place != target:
        raise GranaryError(f"{folder} maps {place} to {target}: a transcoder, not an SAE")
    d, f = config["hidden_size"], config["feature_size"]
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = take(read_tensors(folder, WEIGHTS), shapes, folder)
    layer = re.fullmatch(r"(?:model\.)?layers\.(\d+)", place or "")
    raw = RawSAE(
        W_enc_FD,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        k=config["k"],
        pre_bias=True,
        provenance={
            "converted_from": "opensae",
            "source": config,
            **({"hook": f"layers.{layer[1]}.resid_post"} if layer else {}),
        },
    )
    if not config.get("input_normalize", True):
        return raw
    shift_back = bool(config.get("normalize_shift_back", False))
    scaled = raw.from_sample_std(scale_output=shift_back)
    return replace(scaled, layer_norm=True, shift_back=shift_back)


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for an activation other than topk."""
    raw = raw.expressed_in("opensae", ("topk",))
    if raw.layer_norm:
        raw = raw.with_sample_std(scale_output=raw.shift_back)
    raw = raw.with_pre_bias(True)
    f, d = raw.W_enc_FD.shape
    layer = re.fullmatch(r"layers\.(\d+)\.resid_post", str(raw.provenance.get("hook")))
    place = f"layers.{layer[1]}" if layer else None
    config = {
        "activation": "topk",
        "architectures": [ARCHITECTURE],
        "decoder_impl": "torch",
        "feature_size": f,
        "hidden_size": d,
        "input_hookpoint": place,
        "output_hookpoint": place,
        "input_normalize": raw.layer_norm,
        "input_normalize_eps": 1e-5,
        "k": raw.k,
        "model_name": (raw.provenance.get("model") or {}).get("id"),
        "multi_topk": None,
        "normalize_decoder": False,
        "normalize_shift_back": raw.layer_norm and raw.shift_back,
        "torch_dtype": "float32",
    }
    tensors = {
        "encoder.weight": raw.W_enc_FD,
        "encoder.bias": raw.b_enc_F,
        "W_dec": raw.W_dec_FD,
        "b_dec": raw.b_dec_D,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / f"{WEIGHTS}.safetensors",
        metadata={"format": "pt"},
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
