"""Dictionaries: what they are, how they are learnt, saved and loaded. Names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.sae.config import DictionaryConfig, SAEConfig
    from shared.sae.folder import load_provenance
    from shared.sae.latents import SAEOutput, SparseLatents
    from shared.sae.loading import load, load_config
    from shared.sae.sets import load_set
    from shared.sae.variants import CLT, SAE, Crosscoder, Dictionary, Lorsa, MoLT, SkipTranscoder, Transcoder

_HOMES = {
    "CLT": "variants",
    "SAE": "variants",
    "Crosscoder": "variants",
    "Dictionary": "variants",
    "DictionaryConfig": "config",
    "Lorsa": "variants",
    "MoLT": "variants",
    "SAEConfig": "config",
    "SAEOutput": "latents",
    "SparseLatents": "latents",
    "SkipTranscoder": "variants",
    "Transcoder": "variants",
    "load": "loading",
    "load_config": "loading",
    "load_provenance": "folder",
    "load_set": "sets",
}

__all__ = [
    "CLT",
    "SAE",
    "Crosscoder",
    "Dictionary",
    "DictionaryConfig",
    "Lorsa",
    "MoLT",
    "SAEConfig",
    "SAEOutput",
    "SkipTranscoder",
    "SparseLatents",
    "Transcoder",
    "load",
    "load_config",
    "load_provenance",
    "load_set",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] != "config":
        importlib.import_module("shared.sae.loading")  # so that from_pretrained reads every format
    return getattr(importlib.import_module(f"shared.sae.{_HOMES[name]}"), name)
