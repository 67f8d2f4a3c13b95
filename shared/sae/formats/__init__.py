"""Other projects' folders: which one a folder is, read it, write it.

Each format module has ``matches``, ``read`` and, where this project can write it, ``save`` and ``HOLDS``: the
activations that it holds of each kind of dictionary. They meet in `shared.sae.formats.raw.RawDictionary`, but for maps.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from shared.sae.config import DictionaryConfig
from shared.sae.formats import (
    crosscoder_learning,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    llamascopium,
    opensae,
    plain,
    prisma,
    sae_made_easy,
    saelens,
    saev,
    sparsify,
)
from shared.sae.formats.held import check_held
from shared.sae.formats.llamascopium import RawMoLT
from shared.sae.formats.llamascopium_lorsa import RawLorsa
from shared.sae.formats.raw import RawDictionary
from shared.sae.formats.source import Source

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "crosscoder_learning": crosscoder_learning,
    "dictionary_learning": dictionary_learning,
    "opensae": opensae,
    "llama_scope": llama_scope,
    "llamascopium": llamascopium,
    "gemma_scope": gemma_scope,
    "sae_made_easy": sae_made_easy,
    "saev": saev,
    "prisma": prisma,
    "plain": plain,
}
WRITABLE = tuple(name for name, module in FORMATS.items() if hasattr(module, "save"))
"""Formats that this project writes."""


def foreign(folder: Path) -> str | None:
    """Name of the other project's format that the folder's files are of; None where none fits."""
    return next((name for name, module in FORMATS.items() if module.matches(folder)), None)


def load(
    name: str, path: Path, ignore: Collection[str] = (), given: Mapping[str, Any] | None = None
) -> RawDictionary | RawMoLT | RawLorsa:
    """The dictionary in a folder, or a lone file of weights, of the format `name`.

    The keys and tensors in `ignore` are left out; `given` are settings that the files do not say. Raises GranaryError
    for what can't be read, and for a key or tensor that the reader does not know.
    """
    source = Source(path, ignore, given=given) if path.is_dir() else Source(path.parent, ignore, path, given)
    raw: RawDictionary | RawMoLT | RawLorsa = FORMATS[name].read(source)
    source.close()
    return raw


def save(
    name: str, config: DictionaryConfig, tensors: Mapping[str, Tensor], provenance: dict[str, Any], folder: Path
) -> None:
    """Write a dictionary as format `name`; raises GranaryError for what the format can't express."""
    check_held(name, FORMATS[name].HOLDS, config)
    FORMATS[name].save(RawDictionary.from_checkpoint(config, tensors, provenance), folder)
