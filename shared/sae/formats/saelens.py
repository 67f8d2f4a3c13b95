"""SAELens (``cfg.json`` + ``sae_weights.safetensors``), written for ``sae_lens.SAE.load_from_disk``.

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec; z = (x - b_dec) W_enc + b_enc, the subtraction if
``apply_b_dec_to_input``. Architectures:

    standard    relu(z)
    topk        relu of the k largest z, of z |W_dec| if ``rescale_acts_by_decoder_norm``
    jumprelu    relu(z) where z > threshold [F]; what SAELens makes of a trained batchtopk
    gated       relu((x - b_dec) (W_enc exp(r_mag)) + b_mag) where z > 0, z with b_gate in place of b_enc
    batchtopk, matryoshka_batchtopk
                training checkpoints, with the scalar ``topk_threshold``; read only

Its layer_norm divides by the standard deviation over d - 1.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json, read_tensors, take
from shared.sae.formats.raw import RawSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights"
# The version whose format this is; loaders of SAELens migrate files without it as if they were from before 6.0.
SAE_LENS_VERSION = "6.54.12"

SCALER = "activation_scaler.json"

# This project's activation: the architecture that holds it.
ARCHITECTURES = {
    "topk": "topk",
    "relu": "standard",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "gated": "gated",
}
TRAINING = ("batchtopk", "matryoshka_batchtopk")

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for transcoders and other architectures, and for normalisations that can't be folded."""
    cfg = read_json(folder / CONFIG)
    architecture = str(cfg.get("architecture"))
    if architecture not in (*ARCHITECTURES.values(), *TRAINING):
        known = ", ".join(dict.fromkeys([*ARCHITECTURES.values(), *TRAINING]))
        raise GranaryError(f"{folder} holds a {architecture} SAE: {known} can be read")
    if cfg.get("reshape_activations", "none") != "none":
        raise GranaryError(f"{folder} is for attention heads (reshape_activations): not an SAE of one stream")
    raw = read_weights(folder, cfg, architecture)
    if cfg.get("rescale_acts_by_decoder_norm", False):  # its latents are then scaled by the norm, and back in decode
        raw = raw.with_unit_scores()
    match cfg.get("normalize_activations", "none"):
        case "none" | None:
            return raw
        case "layer_norm":
            return replace(raw.from_sample_std(scale_output=True), layer_norm=True)
        case "expected_average_only_in":
            return raw.with_input_scale(training_scale(folder, cfg))
        case other:
            raise GranaryError(f"{folder}: normalize_activations={other}: fold it into the weights with SAELens first")


def read_weights(folder: Path, cfg: dict[str, Any], architecture: str) -> RawSAE:
    """The weights as they are in the file."""
    d, f = cfg["d_in"], cfg["d_sae"]
    bias = "b_gate" if architecture == "gated" else "b_enc"
    tensors = read_tensors(folder, WEIGHTS)
    shapes = {"W_enc": (d, f), bias: (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = take(tensors, shapes, folder)
    metadata = cfg.get("metadata") or {}
    raw = RawSAE(
        W_enc_DF.T,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        pre_bias=bool(cfg.get("apply_b_dec_to_input", True)),
        activation={"standard": "relu"}.get(architecture, architecture),
        provenance={**hook_record(metadata.get("hook_name")), "converted_from": "saelens", "metadata": metadata},
    )
    if architecture == "topk":
        return replace(raw, k=cfg["k"])
    if architecture == "jumprelu":
        return replace(raw, threshold_F=take(tensors, {"threshold": (f,)}, folder)[0])
    if architecture in TRAINING:
        (threshold,) = take(tensors, {"topk_threshold": ()}, folder)
        return replace(raw, activation="batchtopk", k=round(cfg["k"]), threshold_F=threshold.expand(f))
    if architecture == "gated":
        r_mag_F, b_mag_F = take(tensors, {"r_mag": (f,), "b_mag": (f,)}, folder)
        return replace(raw, r_mag_F=r_mag_F, b_mag_F=b_mag_F)
    return raw


def training_scale(folder: Path, cfg: dict[str, Any]) -> float:
    """The factor on activations that SAELens keeps beside a training checkpoint, and folds at the end of training."""
    path = folder / SCALER
    scale = read_json(path).get("scaling_factor") if path.is_file() else cfg.get("norm_scaling_factor")
    if not isinstance(scale, int | float) or scale <= 0:
        raise GranaryError(
            f"{folder}: normalize_activations=expected_average_only_in, and no {SCALER} says by which factor:"
            " take the folder that SAELens writes when training ends"
        )
    return float(scale)


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for what SAELens can't express."""
    raw = raw.expressed_in("saelens", tuple(ARCHITECTURES))
    if not raw.shift_back:
        raise GranaryError("SAELens scales layer-normalised reconstructions back: shift_back=false can't be expressed")
    if raw.layer_norm:
        raw = raw.with_sample_std(scale_output=True)
    f, d = raw.W_enc_FD.shape
    architecture = ARCHITECTURES[raw.activation]
    tensors = {"W_enc": raw.W_enc_FD.T, "b_enc": raw.b_enc_F, "W_dec": raw.W_dec_FD, "b_dec": raw.b_dec_D}
    extra: dict[str, Any] = {}
    if architecture == "topk":
        extra = {"k": raw.k, "rescale_acts_by_decoder_norm": False}
    elif architecture == "jumprelu":
        tensors["threshold"] = raw.thresholds()
    elif architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors["r_mag"], tensors["b_mag"] = raw.magnitudes()
    cfg = {
        "architecture": architecture,
        **extra,
        "d_in": d,
        "d_sae": f,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": raw.pre_bias,
        "normalize_activations": "layer_norm" if raw.layer_norm else "none",
        "reshape_activations": "none",
        "metadata": saelens_metadata(raw.provenance) | {"training_architecture": raw.activation},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{WEIGHTS}.safetensors")
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


def saelens_metadata(provenance: dict[str, Any]) -> dict[str, Any]:
    """What SAELens records of the model and the hook."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", str(provenance.get("hook")))
    hook = f"blocks.{match[1]}.{HOOKS[match[2]]}" if match and match[2] in HOOKS else None
    return {
        "sae_lens_version": SAE_LENS_VERSION,
        "model_name": (provenance.get("model") or {}).get("id"),
        "hook_name": hook,
        "context_size": provenance.get("seq_len"),
        "prepend_bos": True,
    }


def hook_record(name: str | None) -> dict[str, str]:
    """``{"hook": "layers.3.resid_post"}`` for a TransformerLens name of a known site, else nothing."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name or "")
    sites = {theirs: ours for ours, theirs in HOOKS.items()}
    return {"hook": f"layers.{match[1]}.{sites[match[2]]}"} if match and match[2] in sites else {}
