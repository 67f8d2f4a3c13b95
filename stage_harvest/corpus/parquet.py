"""Parquet files: one column is the document. Read row group by row group."""

import random
from collections.abc import Iterator

from shared.basics.errors import GranaryError
from stage_harvest.corpus.base import Document, Source, as_document
from stage_harvest.corpus.files import SourceFile, describe_files, find_files, fingerprint_files, ordered, reading

ROWS_PER_READ = 1024


class ParquetFiles(Source):
    """The `column` of each row: text, chat messages or token ids; nulls are left out."""

    def __init__(self, files: str, column: str) -> None:
        self.files = find_files(files)
        self.column = column

    @property
    def description(self) -> str:
        return f"{describe_files('parquet', self.files)}, column {self.column}"

    def fingerprint(self) -> str:
        return fingerprint_files(self.files)

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for file in ordered(self.files, order):
            with reading(file):
                yield from self._read(file)

    def _read(self, file: SourceFile) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        with file.open(decompress=False) as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
            except pyarrow.ArrowInvalid as error:
                raise GranaryError(f"{file.path} is not a parquet file: {str(error).splitlines()[0]}") from error
            names = table.schema_arrow.names
            if self.column not in names:
                raise GranaryError(f"{file.path} has no column {self.column!r}: there are {', '.join(names)}")
            for batch in table.iter_batches(batch_size=ROWS_PER_READ, columns=[self.column]):
                for value in batch.column(0):
                    document = as_document(value.as_py(), f"{file.path}, column {self.column!r}")
                    if document is not None:
                        yield document
