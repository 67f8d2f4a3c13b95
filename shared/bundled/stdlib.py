"""The standard library of the running interpreter as a text corpus.

It is on every machine that runs this project, so a demonstration needs no download. Python source carries its own
documentation in docstrings; `pydoc_data/topics.py`, which holds the language reference, is given as one document per
topic. The files differ from one Python version to the next: `content_hash` tells such corpora apart, and
`description` names the version. Whether a file is held out depends on its path alone, so a file that is in both
versions is on the same side in both.
"""

import ast
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from shared.basics.errors import GranaryError

Document = tuple[str, str]
"""(document id, text). The id is a path relative to the library, with `/`; a topic adds `#` and its name."""

Split = Literal["train", "heldout", "all"]

HELDOUT_PER_MILLE = 20

_SUFFIXES = frozenset({".py", ".txt", ".rst"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Tables and sample inputs: neither source that someone would read nor documentation.
_SKIPPED_DATA_FOLDERS = frozenset({"lib2to3/tests/data", "encodings"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_TOPICS = "pydoc_data/topics.py"


def documents(split: Split = "train", *, include_tests: bool = True, root: Path | None = None) -> Iterator[Document]:
    """Yield (document id, text) for each document of one split, in the sorted order of the file paths.

    `include_tests=False` leaves out the library's own tests, more than half of its bytes. `root` is the folder to
    read, by default the standard library of this interpreter. Files that are empty or not UTF-8 are left out, and so
    are the character tables under `encodings/`; line ends become `\\n`.

    Raises GranaryError if `split` is unknown or there is not one file to read.
    """
    if split not in get_args(Split):
        raise GranaryError(f"unknown split {split!r} of the stdlib corpus: use one of {', '.join(get_args(Split))}")
    folder = root if root is not None else stdlib_root()
    paths = list(_relative_paths(folder, include_tests))
    if not paths:
        raise GranaryError(
            f"no Python source under {folder}: this interpreter comes without its standard library's source;"
            " use another interpreter or another corpus"
        )
    for path in paths:
        if split != "all" and is_heldout(path) != (split == "heldout"):
            continue
        text = _read_utf8(folder / path)
        if text is None or not text.strip():
            continue
        if path == _TOPICS:
            yield from ((f"{path}#{name}", topic) for name, topic in _topics(text))
        else:
            yield path, text


def is_heldout(path: str) -> bool:
    """Whether the file at `path` (relative, with `/`) belongs to the held-out split: about 2% of all paths do.

    A document id works as well: a topic is on the side of its file.
    """
    file_path = path.partition("#")[0]
    digest = hashlib.sha256(file_path.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELDOUT_PER_MILLE


def content_hash(corpus: Iterable[Document]) -> str:
    """SHA-256 (hex) over the ids and texts in the order given; reads the whole corpus once.

    Each part is preceded by its length in bytes, so that no two different corpora give the same input.
    """
    digest = hashlib.sha256()
    for document in corpus:
        for part in document:
            data = part.encode("utf-8")
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()


def description(split: Split = "train", *, include_tests: bool = True) -> str:
    """One line that says what the corpus is, for a store's or a model's metadata."""
    tests = "with its tests" if include_tests else "without its tests"
    return f"standard library of {platform.python_implementation()} {platform.python_version()}, {tests}, split {split}"


def stdlib_root() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _relative_paths(folder: Path, include_tests: bool) -> Iterator[str]:
    """Paths of the corpus files relative to `folder`, sorted as strings, whatever order the file system gives."""
    left_out = _SKIPPED_FOLDERS if include_tests else _SKIPPED_FOLDERS | _TEST_FOLDERS
    found = []
    for parent, folders, files in os.walk(folder):  # not Path.rglob: it would also read all installed packages
        here = Path(parent).relative_to(folder)
        folders[:] = [
            name for name in folders if name not in left_out and (here / name).as_posix() not in _SKIPPED_DATA_FOLDERS
        ]
        found += [
            (here / name).as_posix()
            for name in files
            if os.path.splitext(name)[1] in _SUFFIXES and os.path.isfile(os.path.join(parent, name))
        ]
    return iter(sorted(found))


def _read_utf8(file: Path) -> str | None:
    """The text of `file`, or None if it is not UTF-8 (the library keeps such files as test data)."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _topics(source: str) -> list[tuple[str, str]]:
    """(name, text) of each topic in the source of `pydoc_data/topics.py`, sorted by name.

    The file assigns one literal dictionary. It is parsed and not imported: the corpus may lie in another folder.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return sorted((str(name), str(text)) for name, text in topics.items())
    raise GranaryError(f"{_TOPICS} of this interpreter holds no dictionary of topics; use another interpreter")
