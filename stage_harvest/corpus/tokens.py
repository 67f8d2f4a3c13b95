"""Token ids made elsewhere, with this model's tokenizer: .npy arrays and raw .bin files."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from stage_harvest.corpus.base import CorpusSource, Document
from stage_harvest.corpus.files import SourceFile, describe_files, find_files, fingerprint_files, ordered, reading

SUFFIXES = (".npy", ".bin")
RAW_DTYPES = ("uint16", "uint32", "int32", "int64")

TokenArray = npt.NDArray[np.integer[Any]]


class TokenFiles(CorpusSource):
    """Rows of a 2-D array are documents; a 1-D array is cut after each `document_end`, or is one document."""

    def __init__(self, files: str, dtype: str, document_end: int | None) -> None:
        if dtype not in RAW_DTYPES:
            raise GranaryError(f"corpus.dtype={dtype!r}: choose from {', '.join(RAW_DTYPES)}")
        self.files = find_files(files, SUFFIXES)
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
                yield from (Document(row, f"{file.path} row {number}") for number, row in enumerate(ids, 1))
            elif self.document_end is None:
                yield Document(ids, file.path)
            else:
                ends = np.flatnonzero(ids == self.document_end) + 1
                for start, part in zip([0, *ends.tolist()], np.split(ids, ends), strict=True):
                    if part.size:
                        yield Document(part, f"{file.path} from id {start}")

    def _read(self, file: SourceFile) -> TokenArray:
        ids: TokenArray
        if not file.name.endswith(".npy"):
            dtype = np.dtype(self.dtype).newbyteorder("<")
            if file.size % dtype.itemsize:
                raise GranaryError(f"{file.path}: {file.size} bytes are no whole number of {self.dtype} token ids")
            if file.is_local:
                return np.memmap(file.path, dtype=dtype, mode="r")
            with file.open(decompress=False) as stream:
                return np.frombuffer(stream.read(), dtype=dtype)
        try:
            if file.is_local:
                ids = np.load(file.path, mmap_mode="r")
            else:
                with file.open(decompress=False) as stream:
                    ids = np.load(stream)
        except ValueError as error:
            raise GranaryError(f"{file.path} is not an array of token ids: {str(error).splitlines()[0]}") from error
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise GranaryError(f"{file.path} is {ids.ndim}-D {ids.dtype}: token ids are a 1-D or 2-D integer array")
        return ids
