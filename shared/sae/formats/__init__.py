"""Other projects' SAE folders: which one a folder is, read it, write it.

Each format module has ``matches``, ``load`` and, where this project can write it, ``save``; they meet in
`shared.sae.formats.raw.RawSAE`.
"""

from pathlib import Path
from types import ModuleType

from shared.sae.formats import dictionary_learning, gemma_scope, llama_scope, opensae, saelens, sparsify

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
