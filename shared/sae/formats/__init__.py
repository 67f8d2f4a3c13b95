"""Other projects' SAE folders: which one a folder is, read it, write it.

Each format module has ``matches``, ``read`` and, where this project can write it, ``save``; they meet in
`shared.sae.formats.raw.RawSAE`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.sae.formats import dictionary_learning, gemma_scope, llama_scope, opensae, plain, saelens, sparsify
from shared.sae.formats.raw import RawSAE
from shared.sae.formats.source import Source

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "opensae": opensae,
    "llama_scope": llama_scope,
    "gemma_scope": gemma_scope,
    "plain": plain,
}


def foreign(folder: Path) -> str | None:
    """Name of the other project's format that the folder's files are of; None where none fits."""
    return next((name for name, module in FORMATS.items() if module.matches(folder)), None)


def load(name: str, path: Path, ignore: Collection[str] = (), given: Mapping[str, Any] | None = None) -> RawSAE:
    """The SAE in a folder, or a lone file of weights, of the format `name`.

    The keys and tensors in `ignore` are left out; `given` are settings that the files do not say. Raises GranaryError
    for what can't be read, and for a key or tensor that the reader does not know.
    """
    source = Source(path, ignore, given=given) if path.is_dir() else Source(path.parent, ignore, path, given)
    raw: RawSAE = FORMATS[name].read(source)
    source.close()
    return raw
