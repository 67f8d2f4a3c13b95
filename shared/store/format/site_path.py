"""Names of sites: which arrays a store may hold, and where each lies.

A site is a place in a network whose activations are kept, such as ``layers.2.resid_post`` or ``vision/blocks/3``. The
store knows nothing of networks: to it the name is a path, in which '.' and '/' both separate the parts. What names a
language model's places have is for `shared.lm.hookpoint` to say.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise

from shared.basics.errors import GranaryError

MAX_LENGTH = 200  # with a folder's own path, statistics/ and a temporary file's name still below every system's limits
CHUNKS = "c"  # the folder of an array's chunks
SCALE_SUFFIX = "_scale"
# First parts, in lower case: arrays and records that are the store's own.
RESERVED = frozenset(
    ("tokens", "mask", "segments", "statistics", "manifest", "extents", "window", "additions", "_complete", "zarr")
)
RESERVED_FOR_IMAGES = frozenset(("kind", "image", "cell", "images"))  # arrays of multimodal stores
_NAME = re.compile(r"[\w./-]+", re.ASCII)  # letters that every file system and object store spells in one way


@lru_cache(maxsize=4096)
def site_path(name: str) -> str:
    """The Zarr path of a site's array: ``layers/2/resid_post`` for ``layers.2.resid_post``.

    Raises GranaryError for a name that no array of a store may have.
    """
    wrong = _what_is_wrong(name)
    if wrong is not None:
        shown = name if len(name) <= MAX_LENGTH else f"{name[:MAX_LENGTH]}..."
        raise GranaryError(f"{shown!r} can't be the name of a site: {wrong}; write for example layers.2.resid_post")
    return name.replace(".", "/")


def _what_is_wrong(name: str) -> str | None:
    if not _NAME.fullmatch(name):
        return "it may have letters, digits, _ and -, in parts separated by . or /"
    if len(name) > MAX_LENGTH:
        return f"it has {len(name)} characters, more than {MAX_LENGTH}"
    parts = re.split(r"[./]", name)
    if "" in parts:
        return "a part of it is empty"
    if parts[0].lower() in RESERVED | RESERVED_FOR_IMAGES:
        return f"{parts[0]} is what the store calls something of its own"
    if CHUNKS in map(str.lower, parts):
        return f"a part called {CHUNKS} is where Zarr keeps the chunks of an array"
    if any(part.startswith("__") for part in parts):
        return "Zarr keeps names that begin with __ for itself"
    return None


def scale_path(name: str) -> str:
    """The Zarr path of the float16 scales of an int8 site, beside its array."""
    return site_path(name) + SCALE_SUFFIX


def check_sites(names: Collection[str], *, scaled: bool) -> None:
    """Raise GranaryError where a name is no site's, or where two arrays of a store would share a path or contain one.

    `scaled`: each site has an array of scales too. Names that only differ in case count as the same: a store may be
    copied to a file system that does not tell them apart.
    """
    arrays = [(site_path(name), f"site {name}") for name in names]
    if scaled:
        arrays += [(scale_path(name), f"the scales of site {name}") for name in names]
    ordered = sorted((path.lower().split("/"), owner) for path, owner in arrays)
    for (outer, owner), (inner, other) in pairwise(ordered):
        if inner[: len(outer)] == outer:
            clash = "have the same path" if inner == outer else "lie one inside the other"
            raise GranaryError(f"{owner} and {other} {clash} in a store: harvest them into two stores")
