"""ViT-Prisma: ``config.json`` + ``n_images_<N>.pt``, torch's file of plain tensors. Read only.

Tensors: W_enc [D, F], b_enc, W_dec [F, D], b_dec; of gated SAEs b_gate, r_mag, b_mag [F].

    standard    f = relu(z) or relu of the k largest z,   z = (x - b_dec) W_enc + b_enc
    gated       f = relu(exp(r_mag) (x - b_dec) W_enc + b_mag) where (x - b_dec) W_enc + b_gate > 0
                y = f W_dec + b_dec

Its layer_norm divides by the standard deviation over d - 1. A file that holds the configuration as an object of Python
beside the tensors, or a pickle, would run code of its own: it is refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source

CONFIG, WEIGHTS = "config.json", "n_images_*.pt"
# The data, the tokens that were trained on, how, and where it was written.
HARMLESS = (
    "b_dec_init_method", "cached_activations_path", "checkpoint_path", "cls_token_only", "context_size", "d_out",
    "d_sae", "dataset_name", "dataset_path", "dataset_train_path", "dataset_val_path", "dead_feature_threshold",
    "dead_feature_window", "device", "dtype", "expansion_factor", "feature_sampling_window", "from_pretrained_path",
    "hook_point_layer", "image_size", "initialization_method", "is_training", "l1_coefficient", "layer_out_subtype",
    "layer_subtype", "log_to_wandb", "lp_norm", "lr", "lr_scheduler_name", "lr_warm_up_steps", "max_grad_norm",
    "model_class_name", "model_name", "model_path", "n_batches_in_buffer", "n_checkpoints", "n_validation_runs",
    "num_epochs", "num_workers", "out_hook_point_layer", "return_out_only", "seed", "store_batch_size",
    "total_training_images", "total_training_tokens", "train_batch_size", "transcoder_with_skip_connection",
    "use_cached_activations", "use_ghost_grads", "use_patches_only", "verbose", "vit_model_cfg", "wandb_entity",
    "wandb_log_frequency", "wandb_project",
)  # fmt: skip


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and any(folder.glob(WEIGHTS))


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for transcoders, single heads, tanh-relu and a norm that is rescaled."""
    cfg = source.json(CONFIG, HARMLESS)
    cfg.must_be("is_transcoder", False, what="SAEs")
    cfg.must_be("hook_point_head_index", None, what="SAEs of whole activations")
    tensors = source.pickled(file_of(source).name, ("b_enc",) if cfg.get("architecture") == "gated" else ())
    d, f = tensors.matrix("W_enc")
    if cfg.whole("d_in") != d:
        raise GranaryError(f"{cfg.where} has d_in={cfg.get('d_in')}, its tensors have {d}")
    W_enc_DF, W_dec_FD, b_dec_D = tensors.take({"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,)})
    fields = activation_of(cfg)
    if fields["activation"] == "gated":
        b_enc_F, fields["r_mag_F"], fields["b_mag_F"] = tensors.take({"b_gate": (f,), "r_mag": (f,), "b_mag": (f,)})
    else:
        (b_enc_F,) = tensors.take({"b_enc": (f,)})
    provenance = {"converted_from": "prisma", "source": cfg.content}
    raw = RawDictionary(W_enc_DF.T, b_enc_F, W_dec_FD, b_dec_D, pre_bias=True, **fields, provenance=provenance)
    match cfg.text("normalize_activations"):
        case None | "none":
            return raw
        case "layer_norm":
            return replace(raw.from_sample_std(scale_output=True), layer_norm=True)
        case other:
            raise GranaryError(f"{cfg.where} has normalize_activations={other:.40}: none and layer_norm can be read")


def file_of(source: Source) -> Path:
    """The one file of weights."""
    found = [source.file] if source.file is not None else sorted(source.folder.glob(WEIGHTS))
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise GranaryError(f"{source.folder} has {names or 'no n_images_N.pt'}: name one file, with --as prisma")
    return found[0]


def activation_of(cfg: Document) -> dict[str, Any]:
    """The activation and k, as fields of a RawDictionary."""
    settings = cfg.mapping("activation_fn_kwargs")
    match cfg.get("architecture"), cfg.text("activation_fn_str"):
        case "gated", "relu":
            return {"activation": "gated"}
        case None | "standard", "relu":
            return {"activation": "relu"}
        case None | "standard", "topk" if settings.keys() == {"k"}:
            return {"activation": "topk", "k": Document(settings, cfg.where, ()).whole("k")}
        case architecture, name:
            raise GranaryError(
                f"{cfg.where} has architecture={architecture!s:.40} with {name!s:.40} {settings!s:.60}: standard with"
                " relu or topk (k), and gated with relu, can be read"
            )
