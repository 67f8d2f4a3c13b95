"""Published dictionaries under the names that SAELens gives them: ``gemma-scope-2b-pt-res:layer_12/width_16k/...``.

A table that comes with the package, of those releases whose layouts `shared.sae.formats` reads, says where each lies on
the Hugging Face hub. Names and places are SAELens's (its ``pretrained_saes.yaml``); OpenSAE's are its repositories'.
"""

import difflib
import gzip
import json
from functools import cache
from importlib import resources

from shared.basics.errors import GranaryError

MOST_NAMED = 3


@cache
def table() -> dict[str, dict[str, str]]:
    """Say where the dictionaries of each release lie, by their ids: ``hf://owner/repository[/folder]``."""
    packed = (resources.files("shared.sae") / "releases.json.gz").read_bytes()
    found = json.loads(gzip.decompress(packed))
    return {
        release: {
            one: f"hf://{'/'.join(filter(None, (entry['repo'], inside)))}" for one, inside in entry["saes"].items()
        }
        for release, entry in found.items()
    }


def is_named(name: str) -> bool:
    """Whether a text has the form ``release:id``; a URL has not."""
    release, colon, one = name.partition(":")
    return bool(colon and release and one) and "/" not in release and not one.startswith("//")


def place_of(name: str) -> str:
    """The place on the hub of ``release:id``. Raises GranaryError, naming the nearest, for what the table lacks."""
    release, _, one = name.partition(":")
    if release not in table():
        raise GranaryError(f"there is no SAE folder {name}, and no release {release}{_nearest(release, list(table()))}")
    if one not in table()[release]:
        raise GranaryError(f"the release {release} has no dictionary {one}{_nearest(one, list(table()[release]))}")
    return table()[release][one]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=MOST_NAMED, cutoff=0.5) or known[:MOST_NAMED]
    return f": did you mean {' or '.join(close)}?"
