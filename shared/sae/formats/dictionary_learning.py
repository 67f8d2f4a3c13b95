"""dictionary_learning (saprmarks): ``config.json`` + ``ae.pt`` of one of its dictionary classes.

    AutoEncoder          relu((x - bias) encoder^T + encoder.bias), decoder^T + bias
    AutoEncoderNew       relu(x encoder^T + encoder.bias), decoder^T + decoder.bias
    AutoEncoderTopK      the k largest of relu((x - b_dec) encoder^T + encoder.bias)
    BatchTopKSAE         the same where > threshold
    MatryoshkaBatchTopKSAE  the same, weights named W_enc [D, F], W_dec [F, D]
    JumpReluAutoEncoder  relu(z) where z = x W_enc + b_enc > threshold
    GatedAutoEncoder     relu(exp(r_mag) y + mag_bias) where y + gate_bias > 0, y = (x - decoder_bias) encoder^T

encoder.weight is [F, D], decoder.weight [D, F].
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source, Tensors

CONFIG, WEIGHTS = "config.json", "ae.pt"
# Of the trainer: how it was trained. The threshold, norm_factor among them, is in the weights when they are saved.
HARMLESS = (
    "activation_dim", "aux_loss_type", "auxk_alpha", "bandwidth", "buffer", "ctx_len", "decay_end", "decay_start",
    "device", "dict_size", "dtype", "ghost_threshold", "group_fractions", "group_sizes", "group_weights",
    "initial_sparsity_penalty", "io", "k_anneal_steps", "l1_penalty", "l1_warmup_steps", "layer", "lm_name", "lr",
    "n_sparsity_updates", "norm_factor", "p_end", "p_start", "resample_steps", "seed", "sparsity_loss_type",
    "sparsity_norm", "sparsity_penalty", "sparsity_queue_length", "sparsity_warmup_steps", "steps", "submodule_name",
    "target_l0", "threshold_beta", "threshold_start_step", "top_k_aux", "total_steps", "trainer_class",
    "use_auxk", "wandb_name", "warmup_steps", "k",
)  # fmt: skip
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""W_enc [F, D], b_enc, W_dec [F, D], b_dec."""


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for a dictionary class that is not known."""
    config = source.json(CONFIG, ("buffer",))
    trainer = source.document(config.mapping("trainer"), source.folder / CONFIG, HARMLESS)
    name = trainer.text("dict_class")
    if name not in READERS:
        raise GranaryError(f"{source.folder} holds a {name}: {', '.join(map(str, READERS))} can be read")
    raw = READERS[name](source.pickled(WEIGHTS, ("k", "threshold", "group_sizes")), trainer)
    record = {key: trainer.content[key] for key in ("lm_name", "layer", "submodule_name") if key in trainer.content}
    return replace(raw, provenance={"converted_from": "dictionary_learning", "source": record, **hook_of(trainer)})


def hook_of(trainer: Document) -> dict[str, str]:
    """The hook: this project writes it as the submodule's name, dictionary_learning the layer whose output it is."""
    name, layer = trainer.content.get("submodule_name"), trainer.content.get("layer")
    if isinstance(name, str) and re.fullmatch(r"layers\.\d+\.\w+", name):
        return {"hook": name}
    if isinstance(layer, int) and layer >= 0 and name in (f"resid_post_layer_{layer}", f"model.layers.{layer}"):
        return {"hook": f"layers.{layer}.resid_post"}
    return {}


def linear(tensors: Tensors, encoder_bias: str | None, decoder_bias: str) -> Weights:
    """W_enc [F, D], b_enc, W_dec [F, D], b_dec of the classes made of two linear layers."""
    f, d = tensors.matrix("encoder.weight")
    W_enc_FD, W_dec_DF, b_dec_D = tensors.take({"encoder.weight": (f, d), "decoder.weight": (d, f), decoder_bias: (d,)})
    (b_enc_F,) = tensors.take({encoder_bias: (f,)}) if encoder_bias else (torch.zeros(f),)
    return W_enc_FD, b_enc_F, W_dec_DF.T, b_dec_D


def matrices(tensors: Tensors) -> Weights:
    """The same of the classes with W_enc [D, F] and W_dec [F, D]."""
    d, f = tensors.matrix("W_enc")
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = tensors.take(
        {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}
    )
    return W_enc_DF.T, b_enc_F, W_dec_FD, b_dec_D


def read_relu(tensors: Tensors, trainer: Document) -> RawDictionary:
    """AutoEncoder."""
    return RawDictionary(*linear(tensors, "encoder.bias", "bias"), pre_bias=True, activation="relu")


def read_new(tensors: Tensors, trainer: Document) -> RawDictionary:
    """AutoEncoderNew."""
    return RawDictionary(*linear(tensors, "encoder.bias", "decoder.bias"), pre_bias=False, activation="relu")


def read_topk(tensors: Tensors, trainer: Document) -> RawDictionary:
    """AutoEncoderTopK."""
    return RawDictionary(*linear(tensors, "encoder.bias", "b_dec"), pre_bias=True, k=picks(tensors, trainer))


def read_batchtopk(tensors: Tensors, trainer: Document) -> RawDictionary:
    """BatchTopKSAE."""
    raw = RawDictionary(*linear(tensors, "encoder.bias", "b_dec"), pre_bias=True, k=picks(tensors, trainer))
    return thresholded(raw, tensors)


def read_matryoshka(tensors: Tensors, trainer: Document) -> RawDictionary:
    """MatryoshkaBatchTopKSAE, all of its groups."""
    return thresholded(RawDictionary(*matrices(tensors), pre_bias=True, k=picks(tensors, trainer)), tensors)


def read_jumprelu(tensors: Tensors, trainer: Document) -> RawDictionary:
    """JumpReluAutoEncoder."""
    weights = matrices(tensors)
    trainer.must_be("apply_b_dec_to_input", False, None, what="JumpReLU SAEs that read raw activations")
    (threshold_F,) = tensors.take({"threshold": (len(weights[1]),)})
    return RawDictionary(*weights, pre_bias=False, activation="jumprelu", threshold_F=threshold_F)


def read_gated(tensors: Tensors, trainer: Document) -> RawDictionary:
    """GatedAutoEncoder."""
    W_enc_FD, _, W_dec_FD, b_dec_D = linear(tensors, None, "decoder_bias")
    f = len(W_enc_FD)
    gate_F, r_mag_F, b_mag_F = tensors.take({"gate_bias": (f,), "r_mag": (f,), "mag_bias": (f,)})
    return RawDictionary(
        W_enc_FD, gate_F, W_dec_FD, b_dec_D, pre_bias=True, activation="gated", r_mag_F=r_mag_F, b_mag_F=b_mag_F
    )


READERS: dict[str | None, Callable[[Tensors, Document], RawDictionary]] = {
    "AutoEncoder": read_relu,
    "AutoEncoderNew": read_new,
    "AutoEncoderTopK": read_topk,
    "BatchTopKSAE": read_batchtopk,
    "MatryoshkaBatchTopKSAE": read_matryoshka,
    "JumpReluAutoEncoder": read_jumprelu,
    "GatedAutoEncoder": read_gated,
}


def picks(tensors: Tensors, trainer: Document) -> int:
    """k, from the tensors of newer versions or the config."""
    return int(tensors.scalar("k")) if "k" in tensors else trainer.whole("k")


def thresholded(raw: RawDictionary, tensors: Tensors) -> RawDictionary:
    """The BatchTopK SAE with the scalar threshold of the file; -1, as in one that was never trained, counts as 0."""
    (threshold,) = tensors.take({"threshold": ()})
    return replace(raw, activation="batchtopk", threshold_F=threshold.clamp_min(0).expand(len(raw.b_enc_F)))


def save(raw: RawDictionary, folder: Path) -> None:
    """Write the folder; raises GranaryError for layer_norm."""
    raw = raw.without_layer_norm("dictionary_learning")
    f, d = raw.W_enc_FD.shape
    name, trainer_class = WRITERS[raw.activation]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:  # a full disk is an OSError then
        torch.save({key: tensor.contiguous() for key, tensor in state(raw).items()}, file)
    trainer = {
        "trainer_class": trainer_class,
        "dict_class": name,
        "activation_dim": d,
        "dict_size": f,
        **({"k": raw.k} if raw.k is not None else {}),
        "lm_name": (raw.provenance.get("model") or {}).get("id"),
        "submodule_name": raw.provenance.get("hook"),
    }
    (folder / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=2) + "\n", encoding="utf-8")


WRITERS = {
    "topk": ("AutoEncoderTopK", "TopKTrainer"),
    "batchtopk": ("BatchTopKSAE", "BatchTopKTrainer"),
    "relu": ("AutoEncoder", "StandardTrainer"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    "gated": ("GatedAutoEncoder", "GatedSAETrainer"),
}
HOLDS = {"sae": tuple(WRITERS)}


def state(raw: RawDictionary) -> dict[str, Tensor]:
    """The state dict of the class that holds this activation."""
    raw = raw.with_pre_bias(raw.activation != "jumprelu")
    if raw.activation == "jumprelu":
        return {
            "W_enc": raw.W_enc_FD.T,
            "b_enc": raw.b_enc_F,
            "W_dec": raw.W_dec_FD,
            "b_dec": raw.b_dec_D,
            "threshold": raw.thresholds(),
        }
    weights = {"encoder.weight": raw.W_enc_FD, "decoder.weight": raw.W_dec_FD.T}
    if raw.activation == "gated":
        r_mag_F, b_mag_F = raw.magnitudes()
        biases = {"decoder_bias": raw.b_dec_D, "gate_bias": raw.b_enc_F}
        return weights | biases | {"r_mag": r_mag_F, "mag_bias": b_mag_F}
    weights["encoder.bias"] = raw.b_enc_F
    if raw.activation == "relu":
        return weights | {"bias": raw.b_dec_D}
    threshold = raw.thresholds()[0].clone() if raw.activation == "batchtopk" else torch.tensor(-1.0)
    return weights | {"b_dec": raw.b_dec_D, "k": torch.tensor(raw.k, dtype=torch.int), "threshold": threshold}
