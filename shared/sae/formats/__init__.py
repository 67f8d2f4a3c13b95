"""Other projects' SAE folders: which one a folder is, read it, write it.

Each format module has ``matches``, ``load`` and, where this project can write it, ``save``; they meet in
`shared.sae.formats.raw.RawSAE`.
"""

from pathlib import Path
from types import ModuleType

from shared.basics.errors import GranaryError
from shared.sae.folder import is_own, load_provenance, locate
from shared.sae.formats import dictionary_learning, gemma_scope, llama_scope, opensae, saelens, sparsify
from shared.sae.formats.raw import RawSAE
from shared.sae.variants.sae import SAE

__all__ = ["FORMATS", "GRANARY", "convert", "detect", "load_any"]

GRANARY = "granary"
FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "opensae": opensae,
    "llama_scope": llama_scope,
    "gemma_scope": gemma_scope,
}


def foreign(folder: Path) -> str | None:
    """Name of the other project's format that the folder's files are of; None where none fits."""
    return next((name for name, module in FORMATS.items() if module.matches(folder)), None)


def detect(folder: Path) -> str:
    """Name of the format of `folder`, from its files alone; raises GranaryError where none fits."""
    name = GRANARY if is_own(folder) else foreign(folder)
    if name is None:
        raise GranaryError(f"{folder} is not an SAE folder of a known format: {', '.join([GRANARY, *FORMATS])}")
    return name


def load_any(path_or_hub_id: str | Path) -> tuple[SAE, dict[str, object]]:
    """(SAE, provenance) of a folder of any known format, or of a hub repository (owner/name, hf://owner/name/folder)."""
    folder = locate(path_or_hub_id)
    name = detect(folder)
    if name == GRANARY:
        return SAE.from_pretrained(folder), load_provenance(folder)
    raw: RawSAE = FORMATS[name].load(folder)
    return raw.to_sae(), raw.provenance


def convert(source: str | Path, target: Path, to: str) -> str:
    """Write the SAE in the folder or hub repository `source` as format `to` into `target`; returns the source's format.

    Raises GranaryError for a target that holds files, and for an SAE that the format can't express.
    """
    writable = [GRANARY, *(name for name, module in FORMATS.items() if hasattr(module, "save"))]
    if to not in writable:
        raise GranaryError(f"format {to!r} can't be written: choose from {', '.join(writable)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GranaryError(f"{target} is not empty: choose another folder")
    folder = locate(source)
    found = detect(folder)
    sae, provenance = load_any(folder)
    if to == GRANARY:
        sae.save_pretrained(target, provenance)
    else:
        FORMATS[to].save(RawSAE.from_sae(sae, provenance), target)
    return found
