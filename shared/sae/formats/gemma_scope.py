"""Gemma Scope: ``params.npz``; Gemma Scope 2: ``config.json`` + ``params.safetensors``. Read only.

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec, threshold [F] (lower case in Gemma Scope 2); JumpReLU on raw
activations without a pre-encoder bias (Lieberum et al. 2024):

    z = x W_enc + b_enc;   f = relu(z) where z > threshold;   y = f W_dec + b_dec
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json, read_tensors, take
from shared.sae.formats.raw import RawSAE

NPZ, WEIGHTS, CONFIG = "params.npz", "params", "config.json"
SITES = {"res": "resid_post", "resid_post": "resid_post", "mlp": "mlp_out", "mlp_out": "mlp_out"}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / NPZ).is_file() or (folder / f"{WEIGHTS}.safetensors").is_file()


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for transcoders, skip connections and rescaled fine-tunes."""
    tensors = read_npz(folder / NPZ) if (folder / NPZ).is_file() else read_tensors(folder, WEIGHTS)
    tensors = {name.replace("w_", "W_", 1) if name.startswith("w_") else name: x for name, x in tensors.items()}
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    place, target = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if place != target or "affine_skip_connection" in tensors:
        raise GranaryError(f"{folder} maps {place} to {target}: a transcoder, not an SAE")
    scaling = tensors.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise GranaryError(f"{folder} has a scaling_factor, which only its fine-tuned SAEs have: they can't be read")
    d, f = tensors["W_enc"].shape if "W_enc" in tensors else (0, 0)
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), "threshold": (f,)}
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, threshold_F = take(tensors, shapes, folder)
    return RawSAE(
        W_enc_DF.T,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        pre_bias=False,
        activation="jumprelu",
        threshold_F=threshold_F,
        provenance={"converted_from": "gemma_scope", "source": config, **hook_of(folder)},
    )


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of the file, float32."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.asarray(file[name], np.float32)) for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise GranaryError(f"{path} is damaged: {error}") from None


def hook_of(folder: Path) -> dict[str, str]:
    """The hook, where the folder's path tells: ``gemma-scope-2b-pt-res/layer_20/...``, ``resid_post/layer_9_...``."""
    parts = folder.resolve().parts
    layer = next((found for part in reversed(parts) if (found := re.match(r"layer_(\d+)", part))), None)
    words = [part for part in parts if part in SITES] + [
        found[1] for part in parts if (found := re.search(r"gemma-scope-.*-(res|mlp)$", part))
    ]
    return {"hook": f"layers.{layer[1]}.{SITES[words[-1]]}"} if layer and words else {}
