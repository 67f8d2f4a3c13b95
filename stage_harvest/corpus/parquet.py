"""Columnar files: one column is the document. Parquet is read row group by row group, Arrow batch by batch.

Arrow files are what ``datasets`` keeps in its cache and writes by ``save_to_disk`` (as a stream), and Feather (a file).
"""

import random
from collections.abc import Iterator

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from shared.basics.errors import GranaryError, first_line
from stage_harvest.corpus.base import CorpusSource, Document
from stage_harvest.corpus.files import SourceFile, describe_files, find_files, fingerprint_files, ordered, reading
from stage_harvest.corpus.rows import Kind, column_content, column_path

ROWS_PER_READ = 1024
SUFFIXES = (".parquet", ".arrow", ".feather")
ARROW_SUFFIXES = (".arrow", ".feather")


class ParquetFiles(CorpusSource):
    """The `column` of each row: text, chat messages or token ids; nulls and empty lists are left out."""

    def __init__(self, files: str, column: str) -> None:
        self.files = find_files(files, SUFFIXES)
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
        row = 0
        for column, kind in self._columns(file):
            for value in column:
                row += 1
                where = f"{file.path} row {row}"
                content = column_content(value.as_py(), kind, f"{where}, column {self.column!r}")
                if content is not None:
                    yield Document(content, where)

    def _columns(self, file: SourceFile) -> Iterator[tuple[pyarrow.Array, Kind | None]]:
        """The column, batch by batch, and what it holds."""
        is_arrow = file.name.endswith(ARROW_SUFFIXES)
        with file.open(decompress=False) as stream:
            try:
                table = _open_arrow(stream) if is_arrow else pyarrow.parquet.ParquetFile(stream)
            except pyarrow.ArrowInvalid as error:
                name = "an Arrow" if is_arrow else "a parquet"
                raise GranaryError(f"{file.path} is not {name} file: {first_line(error)}") from error
            path, kind = column_path(table.schema if is_arrow else table.schema_arrow, self.column, file.path)
            if is_arrow:
                batches = iter(table) if isinstance(table, pyarrow.RecordBatchReader) else _file_batches(table)
            else:
                batches = table.iter_batches(batch_size=ROWS_PER_READ, columns=[".".join(path)])
            for batch in batches:
                column = batch.column(path[0])
                yield (pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column), kind


def _open_arrow(
    stream: object,
) -> "pyarrow.RecordBatchReader | pyarrow.ipc.RecordBatchFileReader":
    """The reader of an Arrow stream, or of an Arrow file, which begins with a mark of its own."""
    is_file = stream.read(6) == b"ARROW1"  # type: ignore[attr-defined]
    stream.seek(0)  # type: ignore[attr-defined]
    return pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)


def _file_batches(table: "pyarrow.ipc.RecordBatchFileReader") -> Iterator[pyarrow.RecordBatch]:
    for number in range(table.num_record_batches):
        yield table.get_batch(number)
