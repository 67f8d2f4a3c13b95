"""Other projects' SAE folders: which one a folder is, read it, write it.

Each format module has ``matches``, ``load`` and, where this project can write it, ``save``; they meet in
`shared.sae.formats.raw.RawSAE`.
"""

from pathlib import Path
from types import ModuleType

from shared.errors import GranaryError
from shared.sae.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_provenance, locate
from shared.sae.formats import dictionary_learning, gemma_scope, llama_scope, opensae, saelens, sparsify
from shared.sae.formats.raw import RawSAE
from shared.sae.model import SAE

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


def detect(folder: Path) -> str:
    """Name of the format of `folder`, from its files alone; raises GranaryError where none fits."""
    if not folder.is_dir():
        raise GranaryError(f"there is no folder {folder}")
    if (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        return GRANARY
    for name, module in FORMATS.items():
        if module.matches(folder):
            return name
    raise GranaryError(f"{folder} is not an SAE folder of a known format: {', '.join([GRANARY, *FORMATS])}")


def load_any(path_or_hub_id: str | Path) -> tuple[SAE, dict[str, object]]:
    """(SAE, provenance) of a folder of any known format, or of a hub repository of this project."""
    folder = locate(path_or_hub_id)
    name = detect(folder)
    if name == GRANARY:
        return SAE.from_pretrained(folder), load_provenance(folder)
    raw: RawSAE = FORMATS[name].load(folder)
    return raw.to_sae(), raw.provenance


def convert(source: Path, target: Path, to: str) -> str:
    """Write the SAE in `source` as format `to` into the folder `target`; returns the source's format.

    Raises GranaryError for a target that holds files, and for an SAE that the format can't express.
    """
    writable = [GRANARY, *(name for name, module in FORMATS.items() if hasattr(module, "save"))]
    if to not in writable:
        raise GranaryError(f"format {to!r} can't be written: choose from {', '.join(writable)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GranaryError(f"{target} is not empty: choose another folder")
    found = detect(source)
    sae, provenance = load_any(source)
    if to == GRANARY:
        sae.save_pretrained(target, provenance)
    else:
        FORMATS[to].save(RawSAE.from_sae(sae, provenance), target)
    return found
