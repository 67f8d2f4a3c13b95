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
from shared.sae.formats.files import read_json
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Source

CONFIG, WEIGHTS = "config.json", "model"
ARCHITECTURE = "OpenSae"
HARMLESS = (
    "_name_or_path", "architectures", "auxk_alpha", "decoder_impl", "dtype", "jumprelu_theta", "k_experts", "l1_coef",
    "model_name", "model_type", "moe_loss_coef", "multi_topk", "normalize_decoder", "torch_dtype",
    "transformers_version",
)  # fmt: skip
EPS = 1e-5
HOLDS = {"sae": ("topk",)}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    path = folder / CONFIG
    return path.is_file() and ARCHITECTURE in (read_json(path).get("architectures") or [])


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for an activation other than topk, experts, and a hook pair of two different places."""
    config = source.json(CONFIG, HARMLESS)
    config.must_be("activation", "topk", what="TopK SAEs alone")
    config.must_be("num_experts", 1, None, what="SAEs without a router to experts")
    place, target = config.text("input_hookpoint"), config.text("output_hookpoint")
    if place != target:
        raise GranaryError(f"{source.folder} maps {place} to {target}: a transcoder, not an SAE")
    d, f = config.whole("hidden_size"), config.whole("feature_size")
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc_FD, b_enc_F, W_dec_FD, b_dec_D = source.safetensors(WEIGHTS).take(shapes)
    layer = re.fullmatch(r"(?:model\.)?layers\.(\d+)", place or "")
    raw = RawDictionary(
        W_enc_FD,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        k=config.whole("k"),
        pre_bias=True,
        provenance={
            "converted_from": "opensae",
            "source": config.content,
            **({"hook": f"layers.{layer[1]}.resid_post"} if layer else {}),
        },
    )
    normalises, shift_back = config.flag("input_normalize", True), config.flag("normalize_shift_back", False)
    config.must_be("input_normalize_eps", EPS, None, what=f"a per-token normalisation with eps {EPS}")
    if not normalises:
        return raw
    scaled = raw.from_sample_std(scale_output=shift_back)
    return replace(scaled, layer_norm=True, shift_back=shift_back)


def save(raw: RawDictionary, folder: Path) -> None:
    """Write the folder."""
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
        "input_normalize_eps": EPS,
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
