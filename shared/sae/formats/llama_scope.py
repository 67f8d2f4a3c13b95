"""Llama Scope (fnlp/Llama3_1-8B-Base-LX*): ``hyperparams.json`` + ``checkpoints/final.safetensors``. Read only.

Tensors: encoder.weight [F, D], encoder.bias, decoder.weight [D, F], decoder.bias. With s = sqrt(D) / the data set's
mean norm, as the hyperparameters record it,

    z = encoder (s x) + bias;   f = z where z n > s theta;   y = (decoder f + bias) / s

The threshold theta is one number for all latents, in units of raw activations, hence times s (as SAELens reads it);
n is the norm of the latent's decoder column with ``sparsity_include_decoder_norm``, else 1.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from shared.basics.errors import GranaryError
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.saelens import hook_record
from shared.sae.formats.source import LARGEST, Source

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final"
# How it was trained; top_k is that of the training, whose place the threshold has taken.
HARMLESS = (
    "bias_init_method", "ddp_size", "decoder_exactly_fixed_norm", "device", "dtype", "expansion_factor",
    "init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose", "k_warmup_steps",
    "l1_coefficient", "l1_coefficient_warmup_steps", "lp", "sae_pretrained_name_or_path", "seed",
    "strict_loading", "top_k", "tp_size", "use_batch_norm_mse", "use_ghost_grads",
)  # fmt: skip
RELEASED = "the released SAEs of Llama Scope"


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for transcoders, and for another activation or normalisation than the released ones."""
    config = source.json(CONFIG, HARMLESS)
    place, target = config.text("hook_point_in"), config.text("hook_point_out")
    if place != target:
        raise GranaryError(f"{source.folder} maps {place} to {target}: a transcoder, not an SAE")
    config.must_be("act_fn", "jumprelu", what="the JumpReLU SAEs of Llama Scope")
    config.must_be("norm_activation", "dataset-wise", what="SAEs normalised dataset-wise")
    for name in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder"):
        config.must_be(name, False, None, what=RELEASED)
    d, f = config.whole("d_model"), config.whole("d_sae")
    tensors = source.safetensors(WEIGHTS)
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "decoder.weight": (d, f)}
    W_enc_FD, b_enc_F, W_dec_DF = tensors.take(shapes)
    has_bias = config.flag("use_decoder_bias", True)
    b_dec_D = tensors.take({"decoder.bias": (d,)})[0] if has_bias else torch.zeros(d)
    scale = math.sqrt(d) / mean_norm(config.mapping("dataset_average_activation_norm"), source.folder)
    threshold_F = torch.full((f,), config.number("jump_relu_threshold") * scale)
    if config.flag("sparsity_include_decoder_norm", False):
        threshold_F = threshold_F / W_dec_DF.norm(dim=0)
    raw = RawDictionary(
        W_enc_FD,
        b_enc_F,
        W_dec_DF.T,
        b_dec_D,
        pre_bias=False,
        activation="jumprelu",
        threshold_F=threshold_F,
        provenance={"converted_from": "llama_scope", "source": config.content, **hook_of(place)},
    )
    return raw.with_input_scale(scale)


def mean_norm(norms: Mapping[str, object], folder: Path) -> float:
    """The data set's mean norm of what is read, which is what is written."""
    found = norms.get("in")
    if not isinstance(found, int | float) or not 1 / LARGEST <= found <= LARGEST:
        raise GranaryError(f"{folder}: dataset_average_activation_norm does not say that of the input: {norms}")
    return float(found)


def hook_of(place: str | None) -> dict[str, str]:
    """The hook under this project's name, where it has one."""
    return hook_record(place if place and re.fullmatch(r"blocks\.\d+\.hook_\w+", place) else None)
