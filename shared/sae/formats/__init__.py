"""Other projects' SAE folders: which one a folder is, read it, write it.

Each format module has ``matches``, ``read`` and, where this project can write it, ``save``; they meet in
`shared.sae.formats.raw.RawSAE`.
"""

from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from shared.sae.formats import dictionary_learning, gemma_scope, llama_scope, opensae, saelens, sparsify
from shared.sae.formats.raw import RawSAE
from shared.sae.formats.source import Source

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


def load(name: str, folder: Path, ignore: Collection[str] = ()) -> RawSAE:
    """The SAE in a folder of the format `name`, with the keys and tensors in `ignore` left out.

    Raises GranaryError for what can't be read, and for a key or tensor that the reader does not know.
    """
    source = Source(folder, ignore)
    raw: RawSAE = FORMATS[name].read(source)
    source.close()
    return raw
