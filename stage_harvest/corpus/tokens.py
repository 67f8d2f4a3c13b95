"""Token ids made elsewhere, with this model's tokenizer: .npy arrays and raw .bin files."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from stage_harvest.corpus.base import Document, Source
from stage_harvest.corpus.files import SourceFile, describe_files, find_files, fingerprint_files, ordered, reading

RAW_DTYPES = ("uint16", "uint32", "int32", "int64")

TokenArray = npt.NDArray[np.integer[Any]]


class TokenFiles(Source):
    """Rows of a 2-D array are documents; a 1-D array is cut after each `document_end`, or is one document."""

    def __init__(self, files: str, dtype: str, document_end: int | None) -> None:
        if dtype not in RAW_DTYPES:
            raise GranaryError(f"corpus.dtype={dtype!r}: choose from {', '.join(RAW_DTYPES)}")
        self.files = find_files(files)
        self.dtype = dtype
        self.document_end = document_end

    @property
    def description(self) -> str:
        return f"{describe_files('tokens', self.files)}, document end {self.document_end}"

    def fingerprint(self) -> str:
        return fingerprint_files(self.files)

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for file in ordered(self.files, order):
            with reading(file):
                ids = self._read(file)
            if ids.ndim == 2:
                yield from ids
            elif self.document_end is None:
                yield ids
            else:
                ends = np.flatnonzero(ids == self.document_end) + 1
                yield from (part for part in np.split(ids, ends) if part.size)

    def _read(self, file: SourceFile) -> TokenArray:
        ids: TokenArray
        if not file.path.endswith(".npy"):
            dtype = np.dtype(self.dtype).newbyteorder("<")
            if file.size % dtype.itemsize:
                raise GranaryError(f"{file.path}: {file.size} bytes are no whole number of {self.dtype} token ids")
            if _is_local(file):
                return np.memmap(file.path, dtype=dtype, mode="r")
            with file.open(decompress=False) as stream:
                return np.frombuffer(stream.read(), dtype=dtype)
        try:
            if _is_local(file):
                ids = np.load(file.path, mmap_mode="r")
            else:
                with file.open(decompress=False) as stream:
                    ids = np.load(stream)
        except ValueError as error:
            raise GranaryError(f"{file.path} is not an array of token ids: {str(error).splitlines()[0]}") from error
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise GranaryError(f"{file.path} is {ids.ndim}-D {ids.dtype}: token ids are a 1-D or 2-D integer array")
        return ids


def _is_local(file: SourceFile) -> bool:
    return "file" in (file.fs.protocol if isinstance(file.fs.protocol, tuple) else (file.fs.protocol,))
