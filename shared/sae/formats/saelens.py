"""SAELens (``cfg.json`` + ``sae_weights.safetensors``), written for ``sae_lens.SAE.load_from_disk``.

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec; z = (x - b_dec) W_enc + b_enc, the subtraction if
``apply_b_dec_to_input``. Architectures:

    standard    relu(z); up to version 5 also a TopK, with the activation topk
    topk        relu of the k largest z, of z |W_dec| if ``rescale_acts_by_decoder_norm``
    jumprelu    relu(z) where z > threshold [F]; what SAELens makes of a trained batchtopk
    gated       relu((x - b_dec) (W_enc exp(r_mag)) + b_mag) where z > 0, z with b_gate in place of b_enc
    transcoder, skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder
                relu(z), or where z > threshold; W_dec [F, D_out], b_dec [D_out], W_skip [D_out, D_in] (x W_skip^T);
                no b_dec on the input. SAELens adds the skip in forward, not in decode
    batchtopk, matryoshka_batchtopk
                training checkpoints, with the scalar ``topk_threshold``; read only

Its layer_norm divides by the standard deviation over d - 1.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source, Tensors
from shared.sae.sites import Sites

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
# Of transcoders: kind and activation.
TRANSCODERS = {
    "transcoder": ("transcoder", "relu"),
    "skip_transcoder": ("skip_transcoder", "relu"),
    "jumprelu_transcoder": ("transcoder", "jumprelu"),
    "jumprelu_skip_transcoder": ("skip_transcoder", "jumprelu"),
}
THRESHOLDS = ("relu", "jumprelu", "batchtopk")
HOLDS = {"sae": tuple(ARCHITECTURES), "transcoder": THRESHOLDS, "skip_transcoder": THRESHOLDS}
ACTIVATION_KEYS = ("activation_fn", "activation_fn_str")
# Of the model, the data and the training. Before version 6 all of it lay beside what the SAE is.
HARMLESS = (
    # the SAE
    "activation_fn_kwargs", "device", "dtype", "metadata", "neuronpedia_id", "noise_scale", "sae_lens_version",
    "sae_lens_training_version",
    # the model and the data
    "autocast_lm", "cached_activations_path", "compile_llm", "context_size", "dataset_path",
    "dataset_trust_remote_code", "disable_concat_sequences", "exclude_special_tokens", "from_pretrained_path",
    "hook_eval", "hook_head_index", "hook_head_index_out", "hook_layer",
    "hook_layer_out", "hook_name", "hook_point", "hook_point_head_index",
    "hook_point_layer", "is_dataset_tokenized", "llm_compilation_mode", "model_class_name",
    "model_from_pretrained_kwargs", "model_kwargs", "model_name", "n_batches_in_buffer", "prepend_bos",
    "sequence_separator_token", "seqpos_slice", "store_batch_size", "store_batch_size_prompts", "streaming",
    "tokens_per_buffer", "train_batch_size", "train_batch_size_tokens", "training_tokens", "total_training_tokens",
    "use_cached_activations",
    # the training
    "act_store_device", "adam_beta1", "adam_beta2", "autocast", "aux_loss_coefficient", "b_dec_init_method",
    "checkpoint_path", "compile_sae", "dead_feature_threshold", "dead_feature_window", "decoder_heuristic_init",
    "decoder_heuristic_init_norm", "decoder_init_norm", "decoder_orthogonal_init", "eval_batch_size_prompts",
    "eval_every_n_wandb_logs", "expansion_factor", "feature_sampling_window", "init_encoder_as_decoder_transpose",
    "jumprelu_bandwidth", "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale",
    "l0_coefficient", "l0_warm_up_steps", "l1_coefficient", "l1_warm_up_steps", "log_to_wandb", "lp_norm", "lr",
    "lr_decay_steps", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "matryoshka_widths",
    "mse_loss_normalization", "n_checkpoints", "n_eval_batches", "n_restart_cycles", "normalize_sae_decoder",
    "pre_act_loss_coefficient", "resume", "run_name", "sae_compilation_mode",
    "scale_sparsity_penalty_by_decoder_norm", "seed", "topk_threshold_lr", "use_ghost_grads",
    "use_matryoshka_aux_loss", "use_sparse_activations", "verbose", "wandb_entity", "wandb_id",
    "wandb_log_frequency", "wandb_project",
)  # fmt: skip

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
}


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for other architectures, and for normalisations that can't be folded."""
    cfg = source.json(CONFIG, HARMLESS)
    cfg.must_be("reshape_activations", "none", None, what="SAEs of one stream, not of attention heads,")
    raw = read_weights(source, cfg, architecture_of(cfg))
    if cfg.flag("rescale_acts_by_decoder_norm", False):  # its latents are then scaled by the norm, and back in decode
        raw = raw.with_unit_scores()
    match cfg.get("normalize_activations"):
        case "none" | None | False:
            return raw
        case "layer_norm":
            return replace(raw.from_sample_std(scale_output=True), layer_norm=True)
        case "expected_average_only_in" | True:
            return raw.with_input_scale(training_scale(source, cfg))
        case other:
            raise GranaryError(
                f"{source.folder}: normalize_activations={other}: fold it into the weights with SAELens first"
            )


def architecture_of(cfg: Document) -> str:
    """Its name; before there were architectures, and up to version 5, the activation could make another of it."""
    architecture = cfg.text("architecture") or "standard"
    readable = dict.fromkeys([*ARCHITECTURES.values(), *TRAINING, *TRANSCODERS])
    if architecture not in readable:
        raise GranaryError(f"{cfg.where} holds a {architecture} SAE: {', '.join(readable)} can be read")
    named = {name for key in ACTIVATION_KEYS if (name := cfg.text(key)) is not None}
    if not named <= {"relu"} and (architecture not in ("standard", "topk") or named != {"topk"}):
        raise GranaryError(
            f"{cfg.where} has a {architecture} SAE with the activation {', '.join(sorted(named))}: relu and topk can "
            "be read"
        )
    return "topk" if named == {"topk"} else architecture


def read_weights(source: Source, cfg: Document, architecture: str) -> RawDictionary:
    """The weights as they are in the file."""
    d, f = cfg.whole("d_in"), cfg.whole("d_sae")
    kind, activation = TRANSCODERS.get(architecture, ("sae", architecture))
    d_out = cfg.whole("d_out") if architecture in TRANSCODERS else d
    bias = "b_gate" if architecture == "gated" else "b_enc"
    tensors = source.safetensors(WEIGHTS)
    shapes = {"W_enc": (d, f), bias: (f,), "W_dec": (f, d_out), "b_dec": (d_out,)}
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = tensors.take(shapes)
    metadata = cfg.mapping("metadata")
    hook = metadata.get("hook_name") or cfg.text("hook_name") or cfg.text("hook_point")
    record: dict[str, Any] = dict(hook_record(hook))
    if architecture in TRANSCODERS:
        cfg.must_be("apply_b_dec_to_input", False, None, what="transcoders without a bias on what they read")
        record = between(hook, metadata.get("hook_name_out") or cfg.text("hook_name_out"))
    raw = RawDictionary(
        W_enc_DF.T,
        b_enc_F,
        W_dec_FD * finetuning_scale(tensors, cfg, f)[:, None],
        b_dec_D,
        pre_bias=cfg.flag("apply_b_dec_to_input", True) and architecture not in TRANSCODERS,
        kind=kind,
        W_skip_DD=tensors.take({"W_skip": (d_out, d)})[0] if kind == "skip_transcoder" else None,
        activation={"standard": "relu"}.get(activation, activation),
        provenance={**record, "converted_from": "saelens", "metadata": metadata or cfg.content},
    )
    if architecture == "topk":
        return replace(raw, k=picks(cfg))
    if activation == "jumprelu":
        return replace(raw, threshold_F=tensors.take({"threshold": (f,)})[0])
    if architecture in TRAINING:
        (threshold,) = tensors.take({"topk_threshold": ()})
        return replace(raw, activation="batchtopk", k=round(cfg.number("k")), threshold_F=threshold.expand(f))
    if architecture == "gated":
        r_mag_F, b_mag_F = tensors.take({"r_mag": (f,), "b_mag": (f,)})
        return replace(raw, r_mag_F=r_mag_F, b_mag_F=b_mag_F)
    return raw


def picks(cfg: Document) -> int:
    """k, which up to version 5 was an argument of the activation."""
    if cfg.get("k") is not None:
        return cfg.whole("k")
    arguments = Document(cfg.mapping("activation_fn_kwargs"), f"{cfg.where}: activation_fn_kwargs", ())
    k = arguments.whole("k")
    arguments.close()
    return k


def finetuning_scale(tensors: Tensors, cfg: Document, f: int) -> Tensor:
    """[F]: what each latent is multiplied by before the decoder; ones where it was not fine-tuned."""
    is_tuned = cfg.flag("finetuning_scaling_factor", False) or cfg.flag("uses_scaling_factor", False)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            (scale_F,) = tensors.take({name: (f,)})
            if not is_tuned and not torch.equal(scale_F, torch.ones(f)):
                raise GranaryError(f"{cfg.where}: there is a {name}, but finetuning_scaling_factor is not set")
            return scale_F
    return torch.ones(f)


def training_scale(source: Source, cfg: Document) -> float:
    """The factor on activations that SAELens keeps beside a training checkpoint, and folds at the end of training."""
    given = cfg.get("norm_scaling_factor")
    scale = source.json(SCALER).get("scaling_factor") if (source.folder / SCALER).is_file() else given
    if not isinstance(scale, int | float) or not scale > 0:
        raise GranaryError(
            f"{source.folder}: normalize_activations={cfg.content['normalize_activations']}, and no {SCALER} says by "
            "which factor: take the folder that SAELens writes when training ends"
        )
    return float(scale)


def save(raw: RawDictionary, folder: Path) -> None:
    """Write the folder; raises GranaryError for what SAELens can't express."""
    if not raw.shift_back:
        raise GranaryError("SAELens scales layer-normalised reconstructions back: shift_back=false can't be expressed")
    if raw.layer_norm:
        raw = raw.with_sample_std(scale_output=True)
    f, d = raw.W_enc_FD.shape
    architecture = architecture_for(raw)
    tensors = {"W_enc": raw.W_enc_FD.T, "b_enc": raw.b_enc_F, "W_dec": raw.W_dec_FD, "b_dec": raw.b_dec_D}
    extra: dict[str, Any] = {}
    if architecture == "topk":
        extra = {"k": raw.k, "rescale_acts_by_decoder_norm": False}
    elif architecture in TRANSCODERS:
        raw, extra = raw.with_pre_bias(False), {"d_out": raw.W_dec_FD.shape[1]}
        tensors["b_enc"] = raw.b_enc_F
    if "jumprelu" in architecture:
        tensors["threshold"] = raw.thresholds()
    if raw.W_skip_DD is not None:
        tensors["W_skip"] = raw.W_skip_DD
    if architecture == "gated":
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
        "metadata": saelens_metadata(raw) | {"training_architecture": raw.activation},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{WEIGHTS}.safetensors")
    (folder / CONFIG).write_text(json.dumps(cfg, indent=2) + "\n", encoding="utf-8")


def architecture_for(raw: RawDictionary) -> str:
    """Its name there."""
    if raw.kind == "sae":
        return ARCHITECTURES[raw.activation]
    return raw.kind if raw.activation == "relu" else f"jumprelu_{raw.kind}"


def saelens_metadata(raw: RawDictionary) -> dict[str, Any]:
    """What SAELens records of the model and the hook."""
    sites = raw.sites
    hooks = {"hook_name": None if sites is None else hook_name(sites.reads[0])}
    if raw.kind != "sae":
        hooks["hook_name_out"] = None if sites is None else hook_name(sites.writes[0])
    return {
        "sae_lens_version": SAE_LENS_VERSION,
        "model_name": (raw.provenance.get("model") or {}).get("id"),
        **hooks,
        "context_size": raw.provenance.get("seq_len"),
        "prepend_bos": True,
    }


def hook_name(site: str) -> str | None:
    """TransformerLens's name of a site, None where it has none."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", site)
    return f"blocks.{match[1]}.{HOOKS[match[2]]}" if match and match[2] in HOOKS else None


def hook_record(name: object) -> dict[str, str]:
    """``{"hook": "layers.3.resid_post"}`` for a TransformerLens name of a known site, else nothing."""
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name if isinstance(name, str) else "")
    sites = {theirs: ours for ours, theirs in HOOKS.items()} | {"mlp.hook_out": "mlp_out"}
    return {"hook": f"layers.{match[1]}.{sites[match[2]]}"} if match and match[2] in sites else {}


def between(reads: object, writes: object) -> dict[str, Any]:
    """Where a transcoder reads and writes, where both names are of known sites."""
    goes_in, comes_out = hook_record(reads), hook_record(writes)
    return Sites((goes_in["hook"],), (comes_out["hook"],)).record() if goes_in and comes_out else {}
