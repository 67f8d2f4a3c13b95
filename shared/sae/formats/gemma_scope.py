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
from shared.sae.formats.files import check_unpacked
from shared.sae.formats.raw import RawSAE
from shared.sae.formats.source import Source

NPZ, WEIGHTS, CONFIG = "params.npz", "params", "config.json"
HARMLESS = ("l0", "model_name", "type", "width")
SITES = {"res": "resid_post", "resid_post": "resid_post", "mlp": "mlp_out", "mlp_out": "mlp_out"}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / NPZ).is_file() or (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawSAE:
    """Raises GranaryError for transcoders, skip connections and rescaled fine-tunes."""
    folder = source.folder
    npz = source.weights(NPZ)
    is_npz = npz.is_file() and npz.suffix == ".npz"
    tensors = source.tensors(read_npz(npz)) if is_npz else source.safetensors(WEIGHTS)
    capital = {"W" + name[1:] if name.startswith("w_") else name: tensor for name, tensor in tensors.found.items()}
    tensors.found = capital
    is_told = source.file is None and (folder / CONFIG).is_file()
    config = source.json(CONFIG, HARMLESS) if is_told or source.given else source.document({}, folder)
    place, target = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    if place != target or "affine_skip_connection" in tensors:
        raise GranaryError(f"{folder} maps {place} to {target}: a transcoder, not an SAE")
    config.must_be("architecture", "jump_relu", "jumprelu", what="JumpReLU SAEs alone")
    config.must_be("affine_connection", False, None, what="SAEs without a skip connection")
    d, f = tensors.matrix("W_enc")
    if "scaling_factor" in tensors:
        (scaling,) = tensors.take({"scaling_factor": tuple(tensors.found["scaling_factor"].shape)})
        if not torch.allclose(scaling, torch.ones_like(scaling)):
            raise GranaryError(f"{folder} has a scaling_factor, as fine-tuned SAEs do: they can't be read")
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), "threshold": (f,)}
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, threshold_F = tensors.take(shapes)
    return RawSAE(
        W_enc_DF.T,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        pre_bias=False,
        activation="jumprelu",
        threshold_F=threshold_F,
        provenance={
            "converted_from": "gemma_scope",
            "source": config.content,
            **(hook_of_place(place) or hook_of(folder)),
        },
    )


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of the file, float32."""
    try:
        check_unpacked(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.asarray(file[name], np.float32)) for name in file.files}
    except (ValueError, TypeError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise GranaryError(f"{path} is damaged: {error}") from None


def hook_of_place(place: str | None) -> dict[str, str]:
    """The hook of ``model.layers.9.output``, where the file says it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.output", place or "")
    return {"hook": f"layers.{layer[1]}.resid_post"} if layer else {}


def hook_of(folder: Path) -> dict[str, str]:
    """The hook, where the folder's path tells: ``gemma-scope-2b-pt-res/layer_20/...``, ``resid_post/layer_9_...``."""
    parts = folder.resolve().parts
    layer = next((found for part in reversed(parts) if (found := re.match(r"layer_(\d+)", part))), None)
    words = [part for part in parts if part in SITES] + [
        found[1] for part in parts if (found := re.search(r"gemma-scope-.*-(res|mlp)$", part))
    ]
    return {"hook": f"layers.{layer[1]}.{SITES[words[-1]]}"} if layer and words else {}
