"""OpenSAE (THU-KEG): ``config.json`` with architecture OpenSae + ``model.safetensors``, whole or in shards. Read only.

Tensors: encoder.weight [F, D], encoder.bias, W_dec [F, D], b_dec. Algorithm of the released SAEs, x of one token:

    z = (x - mean) / (std + eps) - b_dec, std over d - 1;  f = topk(relu(encoder z + bias));  y = sum f W_dec + b_dec

and, with ``normalize_shift_back``, y (std + eps) + mean. The released ones leave that out: they read normalised
activations and reconstruct raw ones, with the same b_dec on both sides. Statistics are taken in float32 here; OpenSAE
takes them in the dtype the activation comes in.
"""

import re
from dataclasses import replace
from pathlib import Path

from shared.errors import GranaryError
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
