"""dictionary_learning (saprmarks): ``config.json`` + ``ae.pt`` of an AutoEncoderTopK.

Tensors: encoder.weight [F, D], encoder.bias, decoder.weight [D, F], b_dec, k.
encode = topk(relu((x - b_dec) encoder^T + bias)).
"""

import json
import pickle
from pathlib import Path

import torch

from shared.errors import GranaryError
from shared.sae.formats.files import read_json, take
from shared.sae.formats.raw import RawSAE

CONFIG, WEIGHTS = "config.json", "ae.pt"
CLASS = "AutoEncoderTopK"


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load(folder: Path) -> RawSAE:
    """Raises GranaryError for a dictionary class other than AutoEncoderTopK. Reads tensors only, no pickled code."""
    trainer = read_json(folder / CONFIG).get("trainer", {})
    if trainer.get("dict_class") != CLASS:
        raise GranaryError(f"{folder} holds a {trainer.get('dict_class')}: {CLASS} alone can be read yet")
    try:
        tensors = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise GranaryError(f"{folder / WEIGHTS} can't be read as tensors: {str(error).splitlines()[0]}") from None
    f, d = tensors["encoder.weight"].shape if "encoder.weight" in tensors else (0, 0)
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "decoder.weight": (d, f), "b_dec": (d,)}
    W_enc_FD, b_enc_F, W_dec_DF, b_dec_D = (tensor.float() for tensor in take(tensors, shapes, folder))
    k = int(tensors["k"]) if "k" in tensors else int(trainer["k"])
    record = {name: trainer[name] for name in ("lm_name", "layer", "submodule_name") if name in trainer}
    return RawSAE(
        W_enc_FD,
        b_enc_F,
        W_dec_DF.T,
        b_dec_D,
        k=k,
        pre_bias=True,
        provenance={"converted_from": "dictionary_learning", "source": record},
    )


def save(raw: RawSAE, folder: Path) -> None:
    """Write the folder; raises GranaryError for layer_norm."""
    raw = raw.without_layer_norm("dictionary_learning").with_pre_bias(True)
    f, d = raw.W_enc_FD.shape
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "encoder.weight": raw.W_enc_FD.contiguous(),
        "encoder.bias": raw.b_enc_F,
        "decoder.weight": raw.W_dec_FD.T.contiguous(),
        "b_dec": raw.b_dec_D,
        "k": torch.tensor(raw.k, dtype=torch.int),
        "threshold": torch.tensor(-1.0),
    }
    torch.save(tensors, folder / WEIGHTS)
    trainer = {
        "trainer_class": "TopKTrainer",
        "dict_class": CLASS,
        "activation_dim": d,
        "dict_size": f,
        "k": raw.k,
        "lm_name": (raw.provenance.get("model") or {}).get("id"),
        "submodule_name": raw.provenance.get("hook"),
    }
    (folder / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=2) + "\n", encoding="utf-8")
