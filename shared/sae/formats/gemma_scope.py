"""Gemma Scope: ``params.npz``; Gemma Scope 2: ``config.json`` + ``params.safetensors``. Read only.

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec, threshold [F] (lower case in Gemma Scope 2); JumpReLU on raw
activations without a pre-encoder bias (Lieberum et al. 2024):

    z = x W_enc + b_enc;   f = relu(z) where z > threshold;   y = f W_dec + b_dec (+ x affine_skip_connection)

Transcoders, which Gemma Scope 2 has with a skip too, name two places in ``config.json``. Those of Gemma Scope 1 have
nothing but the name of their repository to tell them from SAEs; what they read, the norm before the MLP without its
weight, is no site of a store, so that they record none.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.files import check_unpacked
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Source
from shared.sae.sites import Sites

NPZ, WEIGHTS, CONFIG = "params.npz", "params", "config.json"
HARMLESS = ("l0", "model_name", "type", "width")
SKIP = "affine_skip_connection"
PLACES = {
    "output": "resid_post", "pre_feedforward_layernorm.output": "mlp_in",
    "post_feedforward_layernorm.output": "mlp_out",
}  # fmt: skip
SITES = {"res": "resid_post", "resid_post": "resid_post", "mlp": "mlp_out", "mlp_out": "mlp_out"}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / NPZ).is_file() or (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for rescaled fine-tunes, and for a skip connection beside an SAE."""
    folder = source.folder
    is_npz = (folder / NPZ).is_file()
    tensors = source.tensors(read_npz(folder / NPZ)) if is_npz else source.safetensors(WEIGHTS)
    capital = {"W" + name[1:] if name.startswith("w_") else name: tensor for name, tensor in tensors.found.items()}
    tensors.found = capital
    config = source.json(CONFIG, HARMLESS) if (folder / CONFIG).is_file() else source.document({}, folder)
    place, target = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    config.must_be("architecture", "jump_relu", "jumprelu", what="JumpReLU alone")
    is_transcoder = place != target or names_transcoders(folder)
    skips = config.flag("affine_connection", False) or SKIP in tensors
    if skips and not is_transcoder:
        raise GranaryError(f"{folder} has a skip connection from {place} to itself: SAEs without one can be read")
    d, f = tensors.matrix("W_enc")
    d_out = tensors.matrix("W_dec")[1]
    if "scaling_factor" in tensors:
        (scaling,) = tensors.take({"scaling_factor": tuple(tensors.found["scaling_factor"].shape)})
        if not torch.allclose(scaling, torch.ones_like(scaling)):
            raise GranaryError(f"{folder} has a scaling_factor, as fine-tuned SAEs do: they can't be read")
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d_out), "b_dec": (d_out,), "threshold": (f,)}
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D, threshold_F = tensors.take(shapes)
    return RawDictionary(
        W_enc_DF.T,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        pre_bias=False,
        kind="sae" if not is_transcoder else "skip_transcoder" if skips else "transcoder",
        W_skip_DD=tensors.take({SKIP: (d, d_out)})[0].T if skips else None,
        activation="jumprelu",
        threshold_F=threshold_F,
        provenance={
            "converted_from": "gemma_scope",
            "source": config.content,
            **(between(place, target) if is_transcoder else hook_of_place(place) or hook_of(folder)),
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
    found = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.([\w.]+)", place or "")
    return {"hook": f"layers.{found[1]}.{PLACES[found[2]]}"} if found and found[2] in PLACES else {}


def between(place: str | None, target: str | None) -> dict[str, object]:
    """Where a transcoder reads and writes, where both are sites of this project."""
    goes_in, comes_out = hook_of_place(place), hook_of_place(target)
    return Sites((goes_in["hook"],), (comes_out["hook"],)).record() if goes_in and comes_out else {}


def names_transcoders(folder: Path) -> bool:
    """Whether the folder's path is of a repository of transcoders: ``gemma-scope-2b-pt-transcoders/layer_20/...``."""
    return any(re.search(r"gemma-scope-.*-transcoders$", part) for part in folder.resolve().parts)


def hook_of(folder: Path) -> dict[str, str]:
    """The hook, where the folder's path tells: ``gemma-scope-2b-pt-res/layer_20/...``, ``resid_post/layer_9_...``."""
    parts = folder.resolve().parts
    layer = next((found for part in reversed(parts) if (found := re.match(r"layer_(\d+)", part))), None)
    words = [part for part in parts if part in SITES] + [
        found[1] for part in parts if (found := re.search(r"gemma-scope-.*-(res|mlp)$", part))
    ]
    return {"hook": f"layers.{layer[1]}.{SITES[words[-1]]}"} if layer and words else {}
