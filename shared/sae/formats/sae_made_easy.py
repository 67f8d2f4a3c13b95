"""SAE Made Easy (EvolvingLMMs-Lab/sae): ``adapter_config.json`` + ``adapter_model.safetensors``, as PEFT. Read only.

Tensors of each module: base_model.model.<path>.sae_encoder.weight [F, D], .sae_W_dec [F, D], .sae_b_dec [D]; D is the
width of what comes out of the module.

    z = (x - b_dec) encoder^T;   f = the k largest z, be they negative;   y = f W_dec + b_dec

A folder may hold the SAEs of many modules: ``granary.attach`` takes all, ``--set module=PATH`` one. F is that of the
tensors, since ``num_latents`` is 0 where an expansion was asked for.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.formats.files import read_tensors
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Source, unwrapped

CONFIG, WEIGHTS, PEFT_TYPE = "adapter_config.json", "adapter_model", "TOPK_SAE"
PREFIX, PARTS = "base_model.model.", ("sae_encoder.weight", "sae_W_dec", "sae_b_dec")
# What PEFT writes beside, and what is about training alone.
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "dead_tokens_threshold", "exclude_modules", "expansion_factor",
    "inference_mode", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip


def matches(folder: Path) -> bool:
    """Whether `folder` looks like this format."""
    return (folder / CONFIG).is_file() and (folder / f"{WEIGHTS}.safetensors").is_file()


def read(source: Source) -> RawDictionary:
    """Raises GranaryError for another adapter of PEFT's, and where one of several modules has to be chosen."""
    cfg = source.json(CONFIG, HARMLESS)
    cfg.must_be("peft_type", PEFT_TYPE, what=f"SAEs ({PEFT_TYPE})")
    found = unwrapped(read_tensors(source.folder, WEIGHTS))
    modules, module = modules_of(found), cfg.text("module")
    if not modules:
        raise GranaryError(f"{source.folder} holds no tensor {PREFIX}<path of a module>.{PARTS[0]}")
    if module is None and len(modules) > 1:
        raise GranaryError(
            f"{source.folder} holds the SAEs of {len(modules)} modules: choose one by --set module={modules[0]}, or"
            " attach the folder"
        )
    module = module or modules[0]
    if module not in modules:
        raise GranaryError(f"{source.folder} holds no SAE of {module}, but of {', '.join(modules)}")
    others = {f"{PREFIX}{other}.{part}" for other in modules if other != module for part in PARTS}
    tensors = source.tensors({name: tensor for name, tensor in found.items() if name not in others})
    names = [f"{PREFIX}{module}.{part}" for part in PARTS]
    f, d = tensors.matrix(names[0])
    W_enc_FD, W_dec_FD, b_dec_D = tensors.take(dict(zip(names, ((f, d), (f, d), (d,)), strict=True)))
    if cfg.get("num_latents") and cfg.whole("num_latents") != f:
        raise GranaryError(f"{cfg.where} has num_latents={cfg.get('num_latents')}, its tensors have {f}")
    return RawDictionary(
        W_enc_FD,
        torch.zeros(f),
        W_dec_FD,
        b_dec_D,
        pre_bias=True,
        activation="signed_topk",
        k=cfg.whole("k"),
        provenance={"converted_from": "sae_made_easy", "source": cfg.content, "hook": module},
    )


def modules_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Paths of the modules that the tensors are of, in the order of their names."""
    pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.{re.escape(PARTS[0])}")
    return sorted(match[1] for name in tensors if (match := pattern.fullmatch(name)))
