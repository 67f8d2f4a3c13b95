"""JSON lines: one object per line, one of its fields is the document."""

import json
import random
from collections.abc import Iterator

from shared.basics.errors import GranaryError
from stage_harvest.corpus.base import Document, Source, as_document
from stage_harvest.corpus.files import SourceFile, describe_files, find_files, fingerprint_files, ordered, reading
from stage_harvest.corpus.text import decode


class JsonlFiles(Source):
    """The `field` of each object: text, chat messages or token ids; nulls are left out."""

    def __init__(self, files: str, field: str) -> None:
        self.files = find_files(files)
        self.field = field

    @property
    def description(self) -> str:
        return f"{describe_files('jsonl', self.files)}, field {self.field}"

    def fingerprint(self) -> str:
        return fingerprint_files(self.files)

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for file in ordered(self.files, order):
            with reading(file):
                yield from self._read(file)

    def _read(self, file: SourceFile) -> Iterator[Document]:
        start = 0
        with file.open() as stream:
            for number, line in enumerate(stream, 1):
                text = decode(line, file, start)
                start += len(line)
                if not text.strip():
                    continue
                where = f"{file.path} line {number}"
                try:
                    record = json.loads(text)
                except json.JSONDecodeError as error:
                    raise GranaryError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
                if not isinstance(record, dict) or self.field not in record:
                    fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                    raise GranaryError(f"{where} has no field {self.field!r}: there are {fields}")
                document = as_document(record[self.field], f"{where}, field {self.field!r}")
                if document is not None:
                    yield document
