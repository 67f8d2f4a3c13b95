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
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_json, take
from shared.sae.formats.raw import RawSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
Tensors = dict[str, Tensor]
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""W_enc [F, D], b_enc, W_dec [F, D], b_dec."""


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for a dictionary class that is not known. Reads tensors only, no pickled code."""
    trainer = read_json(folder / CONFIG).get("trainer", {})
    name = trainer.get("dict_class")
    if name not in READERS:
        raise GranaryError(f"{folder} holds a {name}: {', '.join(READERS)} can be read")
    try:
        tensors = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise GranaryError(f"{folder / WEIGHTS} can't be read as tensors: {str(error).splitlines()[0]}") from None
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    record = {key: trainer[key] for key in ("lm_name", "layer", "submodule_name") if key in trainer}
    raw = READERS[name](tensors, trainer, folder)
    return replace(raw, provenance={"converted_from": "dictionary_learning", "source": record})


def linear(tensors: Tensors, folder: Path, encoder_bias: str | None, decoder_bias: str) -> Weights:
    """W_enc [F, D], b_enc, W_dec [F, D], b_dec of the classes made of two linear layers."""
    f, d = tensors["encoder.weight"].shape if "encoder.weight" in tensors else (0, 0)
    shapes = {"encoder.weight": (f, d), "decoder.weight": (d, f), decoder_bias: (d,)}
    W_enc_FD, W_dec_DF, b_dec_D = take(tensors, shapes, folder)
    (b_enc_F,) = take(tensors, {encoder_bias: (f,)}, folder) if encoder_bias else (torch.zeros(f),)
    return W_enc_FD, b_enc_F, W_dec_DF.T, b_dec_D


def matrices(tensors: Tensors, folder: Path) -> Weights:
    """The same of the classes with W_enc [D, F] and W_dec [F, D]."""
    d, f = tensors["W_enc"].shape if "W_enc" in tensors else (0, 0)
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = take(
        tensors, {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,)}, folder
    )
    return W_enc_DF.T, b_enc_F, W_dec_FD, b_dec_D


def read_relu(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """AutoEncoder."""
    return RawSAE(*linear(tensors, folder, "encoder.bias", "bias"), pre_bias=True, activation="relu")


def read_new(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """AutoEncoderNew."""
    return RawSAE(*linear(tensors, folder, "encoder.bias", "decoder.bias"), pre_bias=False, activation="relu")


def read_topk(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """AutoEncoderTopK."""
    return RawSAE(*linear(tensors, folder, "encoder.bias", "b_dec"), pre_bias=True, k=picks(tensors, trainer))


def read_batchtopk(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """BatchTopKSAE."""
    weights = linear(tensors, folder, "encoder.bias", "b_dec")
    return thresholded(RawSAE(*weights, pre_bias=True, k=picks(tensors, trainer)), tensors, folder)


def read_matryoshka(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """MatryoshkaBatchTopKSAE, all of its groups."""
    raw = RawSAE(*matrices(tensors, folder), pre_bias=True, k=picks(tensors, trainer))
    return thresholded(raw, tensors, folder)


def read_jumprelu(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """JumpReluAutoEncoder."""
    weights = matrices(tensors, folder)
    (threshold_F,) = take(tensors, {"threshold": (len(weights[1]),)}, folder)
    return RawSAE(*weights, pre_bias=False, activation="jumprelu", threshold_F=threshold_F)


def read_gated(tensors: Tensors, trainer: dict[str, Any], folder: Path) -> RawSAE:
    """GatedAutoEncoder."""
    W_enc_FD, _, W_dec_FD, b_dec_D = linear(tensors, folder, None, "decoder_bias")
    f = len(W_enc_FD)
    gate_F, r_mag_F, b_mag_F = take(tensors, {"gate_bias": (f,), "r_mag": (f,), "mag_bias": (f,)}, folder)
    return RawSAE(
        W_enc_FD, gate_F, W_dec_FD, b_dec_D, pre_bias=True, activation="gated", r_mag_F=r_mag_F, b_mag_F=b_mag_F
    )


READERS: dict[str, Callable[[Tensors, dict[str, Any], Path], RawSAE]] = {
    "AutoEncoder": read_relu,
    "AutoEncoderNew": read_new,
    "AutoEncoderTopK": read_topk,
    "BatchTopKSAE": read_batchtopk,
    "MatryoshkaBatchTopKSAE": read_matryoshka,
    "JumpReluAutoEncoder": read_jumprelu,
    "GatedAutoEncoder": read_gated,
}


def picks(tensors: Tensors, trainer: dict[str, Any]) -> int:
    """k, from the tensors of newer versions or the config."""
    return int(tensors["k"]) if "k" in tensors else int(trainer["k"])


def thresholded(raw: RawSAE, tensors: Tensors, folder: Path) -> RawSAE:
    """The BatchTopK SAE with the scalar threshold of the file; -1, as in one that was never trained, counts as 0."""
    (threshold,) = take(tensors, {"threshold": ()}, folder)
    return replace(raw, activation="batchtopk", threshold_F=threshold.clamp_min(0).expand(len(raw.b_enc_F)))


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for layer_norm."""
    raw = raw.expressed_in("dictionary_learning", tuple(WRITERS)).without_layer_norm("dictionary_learning")
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


def state(raw: RawSAE) -> Tensors:
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
