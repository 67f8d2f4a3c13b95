"""Files behind a path, a glob or an fsspec URL, and what tells their contents apart."""

import hashlib
import io
import lzma
import random
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression

from shared.basics.display import refuse_password, without_grant
from shared.basics.errors import GranaryError, first_line

# Up to this many bytes a corpus is hashed whole; above, the beginning of each file and its size.
FULL_HASH_BYTES = 64 << 20
HEAD_BYTES = 64 << 10
MOST_DOCUMENT_BYTES = 1 << 30
# What reading raises where a file is torn or gone, or its place does not answer.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus."""

    name: str
    """Path below the folder that all the corpus's files share: the same wherever that folder lies."""
    path: str
    size: int
    fs: Any = field(repr=False, compare=False)

    @property
    def is_local(self) -> bool:
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def open(self, *, decompress: bool = True) -> IO[bytes]:
        """A binary stream, decompressed as the suffix says."""
        stream: IO[bytes] = self.fs.open(self.path, "rb")
        if decompress and self.name.endswith(".zst"):
            return _unzstd(stream)
        compression = infer_compression(self.name) if decompress else None
        if compression is None:
            return stream
        decompressed: IO[bytes] = fsspec.compression.compr[compression](stream, mode="rb")
        return decompressed


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Around what reads `file`: `UNREADABLE` errors become a GranaryError that names it."""
    try:
        yield
    except UNREADABLE as error:
        raise GranaryError(f"{file.path} can't be read to its end: {first_line(error)}") from error


def find_files(pattern: str, suffixes: tuple[str, ...] = ()) -> list[SourceFile]:
    """The files that `pattern` (path, glob, folder or fsspec URL) names, sorted by path.

    A path that is there is that path, whatever signs it holds. Of a folder the files that end in `suffixes` (compressed
    or not) are taken, all of them where none does; hidden files and a README only where a pattern names them.

    Raises GranaryError when there are none, when all of them are empty, when the place can't be reached, or for a URL
    with a password.
    """
    refuse_password(pattern)
    try:
        fs, path = url_to_fs(pattern)
        is_pattern = any(sign in path for sign in "*?[") and not fs.exists(path)
        names = sorted(fs.glob(_without_literal_brackets(fs, path))) if is_pattern else [path]
        infos = [fs.info(name) for name in names if fs.isfile(name)]
        if not infos and not is_pattern and fs.isdir(path):
            infos = _corpus_files([info for _, info in sorted(fs.find(path, detail=True).items())], path, suffixes)
    except ImportError as error:
        raise GranaryError(f"corpus.files={pattern}: {error}") from error
    except (OSError, ValueError) as error:
        raise GranaryError(f"corpus.files={pattern} can't be reached: {first_line(error)}") from error
    if not infos:
        raise GranaryError(f"no file matches corpus.files={pattern}: give a path, a glob or an fsspec URL")
    paths = [str(info["name"]) for info in infos]
    if not any(info["size"] for info in infos):
        raise GranaryError(f"corpus.files={pattern}: {paths[0]} is empty")
    shared_folder = _common_folder(paths)
    return [
        SourceFile(name=without_grant(path[len(shared_folder) :]), path=path, size=int(info["size"]), fs=fs)
        for path, info in zip(paths, infos, strict=True)
    ]


def read_whole(stream: IO[bytes], file: SourceFile) -> bytes:
    """All of `stream`, which is one document; raises GranaryError where that is more than `MOST_DOCUMENT_BYTES`."""
    data = stream.read(MOST_DOCUMENT_BYTES + 1)
    check_document(len(data), file)
    return data


def lines_of(stream: IO[bytes], file: SourceFile) -> Iterator[bytes]:
    """The lines of `stream` with their ends; raises GranaryError for one of more than `MOST_DOCUMENT_BYTES`."""
    while line := stream.readline(MOST_DOCUMENT_BYTES + 1):
        check_document(len(line), file)
        yield line


def check_document(num_bytes: int, file: SourceFile) -> None:
    """Raise GranaryError for a document that no memory should be asked to hold: a few kB can decompress to it."""
    if num_bytes > MOST_DOCUMENT_BYTES:
        raise GranaryError(
            f"{file.path} holds a document of more than {MOST_DOCUMENT_BYTES:,} bytes: split it, or leave the file out"
        )


def _corpus_files(infos: list[Any], folder: str, suffixes: tuple[str, ...]) -> list[Any]:
    """Of the files of `folder` those that are meant to be read."""

    def is_aside(name: str) -> bool:
        parts = name.removeprefix(folder.rstrip("/") + "/").split("/")
        return any(part.startswith(".") for part in parts) or parts[-1].upper().startswith("README")

    infos = [info for info in infos if info["type"] == "file"]  # no pipe, which would be waited for
    open_infos = [info for info in infos if not is_aside(str(info["name"]))]
    chosen = [info for info in open_infos if _uncompressed(str(info["name"])).endswith(suffixes)] if suffixes else []
    return chosen or open_infos


def _uncompressed(name: str) -> str:
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", name)


def _without_literal_brackets(fs: Any, pattern: str) -> str:
    """`pattern` with the brackets of folders that are there by that name escaped."""
    parts = pattern.split("/")
    escaped: list[str] = []
    for number, part in enumerate(parts):
        is_there = "[" in part and not any(sign in part for sign in "*?") and fs.exists("/".join(parts[: number + 1]))
        escaped.append(part.replace("[", "[[]") if is_there else part)
    return "/".join(escaped)


def ordered(files: list[SourceFile], order: random.Random | None) -> list[SourceFile]:
    """`files` without the empty ones, shuffled by `order` if there is one."""
    files = [file for file in files if file.size]
    if order is not None:
        order.shuffle(files)
    return files


def fingerprint_files(files: list[SourceFile]) -> str:
    """SHA-256 over names, sizes and contents; of large corpora (`FULL_HASH_BYTES`) over the files' beginnings."""
    is_small = sum(file.size for file in files) <= FULL_HASH_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0".encode())
        with reading(file), file.open(decompress=False) as stream:
            digest.update(stream.read(file.size if is_small else HEAD_BYTES))
    return digest.hexdigest()


def describe_files(kind: str, files: list[SourceFile]) -> str:
    """One line: kind, number of files, bytes, first name."""
    total = sum(file.size for file in files)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{kind}: {files[0].name}{more}, {total} bytes"


def _unzstd(stream: IO[bytes]) -> IO[bytes]:
    """By pyarrow, which is there in any case; fsspec would need another package."""
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))


def _common_folder(paths: list[str]) -> str:
    folders = [path.rsplit("/", 1)[0].split("/") for path in paths]
    shared: list[str] = []
    for parts in zip(*folders, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared) + "/" if "/" in paths[0] else ""
