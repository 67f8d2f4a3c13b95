"""Llama Scope (fnlp/Llama3_1-8B-Base-LX*): ``hyperparams.json`` + ``checkpoints/final.safetensors``. Read only.

Tensors: encoder.weight [F, D], encoder.bias, decoder.weight [D, F], decoder.bias. With s = sqrt(D) / the data set's
mean norm, as the hyperparameters record it,

    z = encoder (s x) + bias;   f = z where z > s theta;   y = (decoder f + bias) / s

The threshold theta is one number for all latents, in units of raw activations, hence times s (as SAELens reads it).
"""

import math
import re
from pathlib import Path

import torch

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json, read_tensors, take
from shared.sae.formats.raw import RawSAE
from shared.sae.formats.saelens import hook_record

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final"


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for transcoders, and for another activation or normalisation than the released ones."""
    config = read_json(folder / CONFIG)
    place, target = config.get("hook_point_in"), config.get("hook_point_out")
    if place != target:
        raise GranaryError(f"{folder} maps {place} to {target}: a transcoder, not an SAE")
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise GranaryError(f"{folder} has act_fn={config['act_fn']}: the JumpReLU SAEs of Llama Scope can be read")
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        raise GranaryError(f"{folder} has norm_activation={config['norm_activation']}: dataset-wise can be folded")
    for name in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        if config.get(name):
            raise GranaryError(f"{folder} has {name}=true: the released SAEs of Llama Scope can be read")
    d, f = config["d_model"], config["d_sae"]
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "decoder.weight": (d, f), "decoder.bias": (d,)}
    W_enc_FD, b_enc_F, W_dec_DF, b_dec_D = take(read_tensors(folder, WEIGHTS), shapes, folder)
    scale = math.sqrt(d) / float(config["dataset_average_activation_norm"]["in"])
    raw = RawSAE(
        W_enc_FD,
        b_enc_F,
        W_dec_DF.T,
        b_dec_D,
        pre_bias=False,
        activation="jumprelu",
        threshold_F=torch.full((f,), float(config["jump_relu_threshold"]) * scale),
        provenance={"converted_from": "llama_scope", "source": config, **hook_of(place)},
    )
    return raw.with_input_scale(scale)


def hook_of(place: str | None) -> dict[str, str]:
    """The hook under this project's name, where it has one."""
    return hook_record(place if place and re.fullmatch(r"blocks\.\d+\.hook_\w+", place) else None)
