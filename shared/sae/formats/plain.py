"""A lone file of weights without a format: W_enc, b_enc, W_dec, b_dec, and what the activation needs.

    z = W_enc (x - b_dec if pre_bias else x) + b_enc,   f = activation(z),   x^ = sum_i f_i W_dec[i] + b_dec

Read alone, from ``.pt``, ``.safetensors`` or ``.npz``; a state dict may lie under ``state_dict`` beside settings.
Either matrix may be [F, D] or [D, F], which the lengths of the biases tell; a square one must be an nn.Linear's,
whose orientation is known. The file does not say what is computed, so that is given: ``activation``, ``pre_bias``,
``k``, ``threshold`` and ``hook``.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_pickled, read_safetensors
from shared.sae.formats.gemma_scope import read_npz
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Document, Source, Tensors, merged

ACTIVATIONS = ("topk", "batchtopk", "relu", "jumprelu")
NESTED = ("state_dict", "model_state_dict")
# What each tensor may be called, and whether a matrix of that name is an nn.Linear's, [out, in].
NAMES: dict[str, dict[str, bool]] = {
    "W_enc": {"W_enc": False, "encoder.weight": True},
    "b_enc": {"b_enc": False, "encoder.bias": True},
    "W_dec": {"W_dec": False, "decoder.weight": True},
    "b_dec": {"b_dec": False, "decoder.bias": True, "bias": True},
}


def matches(folder: Path) -> bool:
    """Whether a folder says that it is one: it never does, such a file is read where the user says so."""
    return False


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for a folder, and for what neither the file nor the user says."""
    if source.file is None:
        raise GranaryError(f"{source.folder} is a folder: --as plain reads one file of weights")
    tensors, settings = parts_of(source, source.file)
    activation = settings.text("activation")
    if activation not in ACTIVATIONS:
        told = "does not say its activation" if activation is None else f"has activation={activation!r:.40}"
        raise GranaryError(f"{source.file} {told}: give --set activation= one of {', '.join(ACTIVATIONS)}")
    if settings.get("pre_bias") is None:
        raise GranaryError(
            f"{source.file} does not say whether b_dec is taken off the input: give --set pre_bias=true or false"
        )
    b_enc_F, b_dec_D = (vector(tensors, part) for part in ("b_enc", "b_dec"))
    f, d = len(b_enc_F), len(b_dec_D)
    return RawDictionary(
        matrix(tensors, "W_enc", f, d, linear_is_FD=True),
        b_enc_F,
        matrix(tensors, "W_dec", f, d, linear_is_FD=False),
        b_dec_D,
        pre_bias=settings.flag("pre_bias", False),
        activation=activation,
        k=settings.whole("k") if activation in ("topk", "batchtopk") else None,
        threshold_F=thresholds(tensors, settings, f) if activation in ("jumprelu", "batchtopk") else None,
        provenance={"converted_from": "plain", **hook_of(settings)},
    )


def parts_of(source: Source, file: Path) -> tuple[Tensors, Document]:
    """The tensors of the file, and all else that it holds together with what was given."""
    found: dict[str, Any]
    if file.suffix == ".safetensors":
        found = dict(read_safetensors(file))
    else:
        found = dict(read_npz(file)) if file.suffix == ".npz" else read_pickled(file)
    inner = next((name for name in NESTED if isinstance(found.get(name), dict)), None)
    weights = found.pop(inner) if inner is not None else found
    named = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    beside = found if inner is not None else {}
    rest = beside | {str(name): value for name, value in weights.items() if str(name) not in named}
    return source.tensors(named), source.document(merged(rest, source.given, file), file)


def name_of(tensors: Tensors, part: str) -> str:
    """What a part is called in the file."""
    found = [name for name in NAMES[part] if name in tensors]
    if len(found) != 1:
        raise GranaryError(f"{tensors.where} has {'both ' if found else 'none of '}{', '.join(found or NAMES[part])}")
    return found[0]


def vector(tensors: Tensors, part: str) -> Tensor:
    """A bias, of any length."""
    name = name_of(tensors, part)
    (taken,) = tensors.take({name: (tensors.found[name].numel(),)})
    return taken


def matrix(tensors: Tensors, part: str, f: int, d: int, *, linear_is_FD: bool) -> Tensor:
    """Weights as [F, D], from either orientation."""
    name = name_of(tensors, part)
    is_FD = tensors.matrix(name) == (f, d)
    if f == d and NAMES[part][name]:
        is_FD = linear_is_FD
    elif f == d:
        raise GranaryError(f"{tensors.where}: {name} is square, so its orientation can't be told")
    (taken,) = tensors.take({name: (f, d) if is_FD else (d, f)})
    return taken if is_FD else taken.T


def thresholds(tensors: Tensors, settings: Document, f: int) -> Tensor:
    """[F], from the file's tensor, of one number or F, or from the settings."""
    if "threshold" not in tensors:
        return torch.full((f,), settings.number("threshold"))
    if tensors.found["threshold"].numel() == 1:
        return torch.full((f,), tensors.scalar("threshold"))
    (taken,) = tensors.take({"threshold": (f,)})
    return taken


def hook_of(settings: Document) -> dict[str, str]:
    """The place that it reads, where it is given."""
    hook = settings.text("hook")
    return {} if hook is None else {"hook": hook}
