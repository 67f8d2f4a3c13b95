"""The explorer without a server: a folder for any web host, or one HTML file that opens from disk.

Both hold the documents that the server would give, under the same paths, packed by gzip. What needs the model or writes
notes is left out.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shared.basics.disk import telling_disk_errors
from shared.basics.errors import GranaryError
from shared.basics.files import making_folder, write_bytes
from stage_inspect.explorer.bundle import bundle
from stage_inspect.explorer.documents import BLOCK, Documents
from stage_inspect.explorer.pictures import address
from stage_inspect.explorer.server import encoded, static_files

CHUNK = 8  # latents in a file of a folder: a page stays below 100 KB
MAX_LATENTS = 200  # of one HTML file
FIRES_IN = 10  # documents, of a latent that is chosen by chance


def write_folder(documents: Documents, folder: Path) -> int:
    """Write the pages of every latent; returns their number. Raises GranaryError for a folder of other things.

    Pages that are there already stay until all of the new ones can take their place.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "data" / "meta.json").is_file():
        raise GranaryError(f"{folder} holds other files: choose another folder")
    everything = range(documents.latents.num_latents)
    with telling_disk_errors(folder), making_folder(folder, replace=True) as filled:
        for name, content in static_files().items():
            put(filled / ("index.html" if name == "index.html" else f"static/{name}"), content)
        for path, content in tqdm(documents_of(documents, everything, CHUNK), desc="pages", unit=" files", leave=False):
            put(filled / "data" / path, content)
        put(filled / "data" / "meta.json", encoded(documents.meta(**nothing_live(CHUNK))))
    return len(everything)


def put(file: Path, content: bytes) -> None:
    """Write a file of a folder that is being made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def write_json(documents: Documents, chosen: Sequence[int], file: Path) -> None:
    """What `write_page` shows, for programs: ``meta``, ``latents`` by number, ``pictures`` as data URIs by their hash.

    Raises GranaryError for latents that are not there.
    """
    pages = {str(one): documents.latent(one) for one in sorted(set(chosen))}
    digests = sorted({one["thumbnail"] for page in pages.values() for one in pictures_in(page)})
    pictures = {digest: address(documents.latents.thumbnail(digest)) for digest in digests}
    write_bytes(file, encoded({"meta": documents.meta(**nothing_live(1)), "latents": pages, "pictures": pictures}))


def write_page(documents: Documents, chosen: Sequence[int], file: Path) -> None:
    """Write one HTML file with the pages of these latents. Raises GranaryError for too many, or unknown ones."""
    only = sorted(set(chosen))
    if not only or len(only) > MAX_LATENTS:
        raise GranaryError(f"one file holds 1 to {MAX_LATENTS} latents, not {len(only)}: write a folder instead")
    if only[0] < 0 or only[-1] >= documents.latents.num_latents:
        raise GranaryError(f"the latents are 0 to {documents.latents.num_latents - 1}")
    meta = documents.meta(only=only, **nothing_live(1))
    data = {"meta.json": gzip.compress(encoded(meta), mtime=0), **dict(documents_of(documents, only, 1))}
    table = json.dumps({path: base64.b64encode(content).decode() for path, content in data.items()})
    modules = {name[:-3]: content.decode() for name, content in static_files().items() if name.endswith(".js")}
    write_bytes(file, page(bundle(modules, "app"), static_files()["style.css"].decode(), table).encode())


def chosen_by_chance(documents: Documents, count: int = MAX_LATENTS) -> list[int]:
    """Latents that fire in several documents, drawn with a fixed seed; all that fire where those are too few."""
    table = documents.latents.table
    often = np.flatnonzero(table["documents"] >= FIRES_IN)
    pool = often if len(often) >= count else np.flatnonzero(table["fired"])
    if not len(pool):
        pool = np.arange(documents.latents.num_latents)
    return sorted(np.random.default_rng(0).permutation(pool)[:count].tolist())


def documents_of(documents: Documents, latents: Sequence[int], chunk: int) -> Iterator[tuple[str, bytes]]:
    """(path below ``data/``, packed content) of all that the pages of `latents` read, but ``meta.json``."""

    def packed(content: bytes) -> bytes:
        return gzip.compress(content, compresslevel=9, mtime=0)

    held = np.zeros(documents.latents.num_latents, bool)
    held[list(latents)] = True
    for column in documents.columns:
        stored = np.frombuffer(documents.column(column.name), "<u4")  # as bits: those of other latents become 0
        yield (
            f"column/{column.name}.{documents.dtypes[column.name]}.gz",
            packed(np.where(held, stored, 0).astype("<u4").tobytes()),
        )
    names: list[tuple[int, str]] = []
    for block, group in grouped(latents, BLOCK):
        named = documents.named(group)
        names += [(latent, " ".join([named[str(latent)][0] or "", *named[str(latent)][1]])) for latent in group]
        yield f"rows/{block}.json.gz", packed(encoded(named))
    yield "names.json.gz", packed(encoded(names))
    yield "concepts.json.gz", packed(encoded(documents.concepts()))
    sent: set[str] = set()
    for number, group in grouped(latents, chunk):
        pages = {str(one): documents.latent(one) for one in group}
        for digest in dict.fromkeys(one["thumbnail"] for page in pages.values() for one in pictures_in(page)):
            if digest not in sent:
                sent.add(digest)
                yield f"picture/{digest}.webp", documents.latents.thumbnail(digest)
        yield (
            f"latents/{number if chunk > 1 else group[0]}.json.gz",
            packed(encoded(pages)),
        )


def pictures_in(page: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures that a latent's page shows."""
    return page["pictures"]["shown"] if page["pictures"] is not None else []


def grouped(latents: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(number of a block, those of `latents` within it), for every block of `size` latents that has any."""
    groups: dict[int, list[int]] = {}
    for latent in latents:
        groups.setdefault(latent // size, []).append(latent)
    yield from sorted(groups.items())


def nothing_live(chunk: int) -> dict[str, Any]:
    """What pages without a server can do."""
    return {"chunk": chunk, "live": None, "steer": False, "find": None, "box": None, "writable": False}


def page(script: str, style: str, data: str) -> str:
    """The one file; only this script and this style may run in it, and it may ask nobody for anything."""
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; img-src data:;"
        " base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    inert = data.replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>Granary</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n</head>\n<body>\n"
        f'<script type="application/json" id="granary-data">{inert}</script>\n'
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def digest(content: str) -> str:
    """A source of a content security policy that allows exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
