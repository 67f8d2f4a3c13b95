"""SAELens (``cfg.json`` + ``sae_weights.safetensors``), written for ``sae_lens.SAE.load_from_disk``.

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec. encode = topk((x - b_dec) W_enc + b_enc), the subtraction if
``apply_b_dec_to_input``. Its layer_norm divides by the standard deviation over d - 1.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from shared.errors import GranaryError
from shared.sae.formats.files import read_json, read_tensors, take
from shared.sae.formats.raw import RawSAE

CONFIG, WEIGHTS = "cfg.json", "sae_weights"
# The version whose format this is; loaders of SAELens migrate files without it as if they were from before 6.0.
SAE_LENS_VERSION = "6.54.12"

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
    """Raises GranaryError for another architecture than topk, and for run-time normalisations but layer_norm."""
    cfg = read_json(folder / CONFIG)
    if cfg.get("architecture") != "topk":
        raise GranaryError(f"{folder} holds a {cfg.get('architecture')} SAE: TopK SAEs alone can be read yet")
    normalise = cfg.get("normalize_activations", "none")
    if normalise not in ("none", "layer_norm"):
        raise GranaryError(f"{folder}: normalize_activations={normalise}: fold it into the weights with SAELens first")
    if cfg.get("reshape_activations", "none") != "none":
        raise GranaryError(f"{folder} is for attention heads (reshape_activations): not an SAE of one stream")
    d, f = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = take(read_tensors(folder, WEIGHTS), shapes, folder)
    W_enc_FD = W_enc_DF.T
    if cfg.get("rescale_acts_by_decoder_norm", False):  # its latents are then scaled by the norm, and back in decode
        norm_F = W_dec_FD.norm(dim=1)
        W_enc_FD, b_enc_F, W_dec_FD = W_enc_FD * norm_F[:, None], b_enc_F * norm_F, W_dec_FD / norm_F[:, None]
    metadata = cfg.get("metadata", {})
    raw = RawSAE(
        W_enc_FD,
        b_enc_F,
        W_dec_FD,
        b_dec_D,
        k=cfg["k"],
        pre_bias=bool(cfg.get("apply_b_dec_to_input", True)),
        provenance={**hook_record(metadata.get("hook_name")), "converted_from": "saelens", "metadata": metadata},
    )
    if normalise == "layer_norm":
        raw = replace(raw.from_sample_std(scale_output=True), layer_norm=True)
    return raw


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for what SAELens can't express."""
    if not raw.shift_back:
        raise GranaryError("SAELens scales layer-normalised reconstructions back: shift_back=false can't be expressed")
    if raw.layer_norm:
        raw = raw.with_sample_std(scale_output=True)
    f, d = raw.W_enc_FD.shape
    cfg = {
        "architecture": "topk",
        "k": raw.k,
        "rescale_acts_by_decoder_norm": False,
        "d_in": d,
        "d_sae": f,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": raw.pre_bias,
        "normalize_activations": "layer_norm" if raw.layer_norm else "none",
        "reshape_activations": "none",
        "metadata": saelens_metadata(raw.provenance),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"W_enc": raw.W_enc_FD.T, "b_enc": raw.b_enc_F, "W_dec": raw.W_dec_FD, "b_dec": raw.b_dec_D}
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
