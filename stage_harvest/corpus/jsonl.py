"""JSON lines: one object per line, one of its fields is the document."""

import json
import random
from collections.abc import Iterator
from typing import Any

from shared.basics.errors import GranaryError, first_line
from stage_harvest.corpus.base import CorpusSource, Document
from stage_harvest.corpus.files import (
    SourceFile,
    describe_files,
    find_files,
    fingerprint_files,
    lines_of,
    ordered,
    reading,
)
from stage_harvest.corpus.images import pictured_in
from stage_harvest.corpus.rows import as_content, field_value
from stage_harvest.corpus.text import decode

SUFFIXES = (".jsonl", ".ndjson", ".json")


class JsonlFiles(CorpusSource):
    """The `field` of each object: text, chat messages or token ids; nulls are left out."""

    def __init__(self, files: str, field: str, images: str | None = None) -> None:
        """`images` is the field of a row's images; None: the corpus has none."""
        self.files = find_files(files, SUFFIXES)
        self.field, self.images = field, images
        self.has_images = images is not None

    @property
    def description(self) -> str:
        images = "" if self.images is None else f", images {self.images}"
        return f"{describe_files('jsonl', self.files)}, field {self.field}{images}"

    def fingerprint(self) -> str:
        return fingerprint_files(self.files)

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for file in ordered(self.files, order):
            with reading(file):
                yield from self._read(file)

    def _read(self, file: SourceFile) -> Iterator[Document]:
        start = 0
        with file.open() as stream:
            for number, line in enumerate(lines_of(stream, file), 1):
                text = decode(line, file, start)
                start += len(line)
                if not text.strip():
                    continue
                where = f"{file.path} line {number}"
                record = _parse(text, where)
                content = as_content(field_value(record, self.field, where), f"{where}, field {self.field!r}")
                if content is None:
                    continue
                if self.images is not None:
                    # A record of text alone may lack the field.
                    images = record.get(self.images) if isinstance(record, dict) else None
                    content = pictured_in(content, images, file, f"line {number}", self.images)
                yield Document(content, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise GranaryError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise GranaryError(f"{where} is nested too deeply to be read") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise GranaryError(f"{where} can't be read: {first_line(error)}") from error
