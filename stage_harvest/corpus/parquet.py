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
from stage_harvest.corpus.images import pictured_in
from stage_harvest.corpus.rows import Kind, column_content, column_path

ROWS_PER_READ = 1024
PICTURED_ROWS_PER_READ = 8  # of megabytes each
SUFFIXES = (".parquet", ".arrow", ".feather")
ARROW_SUFFIXES = (".arrow", ".feather")


class ParquetFiles(CorpusSource):
    """The `column` of each row: text, chat messages or token ids; nulls and empty lists are left out."""

    def __init__(self, files: str, column: str, images: str | None = None) -> None:
        """`images` is the column of a row's images; None: the corpus has none."""
        self.files = find_files(files, SUFFIXES)
        self.column, self.images = column, images
        self.has_images = images is not None

    @property
    def description(self) -> str:
        images = "" if self.images is None else f", images {self.images}"
        return f"{describe_files('parquet', self.files)}, column {self.column}{images}"

    def fingerprint(self) -> str:
        return fingerprint_files(self.files)

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for file in ordered(self.files, order):
            with reading(file):
                yield from self._read(file)

    def _read(self, file: SourceFile) -> Iterator[Document]:
        row = 0
        for column, kind, images in self._columns(file):
            for place, value in enumerate(column):
                row += 1
                where = f"{file.path} row {row}"
                content = column_content(value.as_py(), kind, f"{where}, column {self.column!r}")
                if content is None:
                    continue
                if self.images is not None:
                    content = pictured_in(content, images[place].as_py(), file, f"row {row}", self.images)
                yield Document(content, where)

    def _columns(self, file: SourceFile) -> Iterator[tuple[pyarrow.Array, Kind | None, pyarrow.Array]]:
        """The column, batch by batch, what it holds, and the column of images (the same without one)."""
        is_arrow = file.name.endswith(ARROW_SUFFIXES)
        with file.open(decompress=False) as stream:
            try:
                table = _open_arrow(stream) if is_arrow else pyarrow.parquet.ParquetFile(stream)
            except pyarrow.ArrowInvalid as error:
                name = "an Arrow" if is_arrow else "a parquet"
                raise GranaryError(f"{file.path} is not {name} file: {first_line(error)}") from error
            schema = table.schema if is_arrow else table.schema_arrow
            path, kind = column_path(schema, self.column, file.path)
            if self.images is not None and self.images not in schema.names:
                raise GranaryError(f"{file.path} has no column {self.images!r}: there are {', '.join(schema.names)}")
            if is_arrow:
                batches = iter(table) if isinstance(table, pyarrow.RecordBatchReader) else _file_batches(table)
            else:
                names = [".".join(path), *([] if self.images is None else [self.images])]
                size = ROWS_PER_READ if self.images is None else PICTURED_ROWS_PER_READ
                batches = table.iter_batches(batch_size=size, columns=names)
            for batch in batches:
                column, images = batch.column(path[0]), batch.column(self.images or path[0])
                yield (pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column), kind, images


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
