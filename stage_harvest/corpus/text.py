"""Plain text files: a document per file, or documents between separator lines."""

import random
from collections.abc import Iterator

from shared.basics.errors import GranaryError
from stage_harvest.corpus.base import CorpusSource, Document
from stage_harvest.corpus.files import (
    SourceFile,
    check_document,
    describe_files,
    find_files,
    fingerprint_files,
    lines_of,
    ordered,
    read_whole,
    reading,
)


class TextFiles(CorpusSource):
    """UTF-8 text; a line that equals `separator` ends a document, which is given without its outer line breaks."""

    is_text = True

    def __init__(self, files: str, separator: str | None = None) -> None:
        self.files = find_files(files)
        self.separator = separator

    @property
    def description(self) -> str:
        return describe_files("text", self.files)

    def fingerprint(self) -> str:
        return fingerprint_files(self.files)

    def documents(self, order: random.Random | None = None) -> Iterator[Document]:
        for file in ordered(self.files, order):
            with reading(file):
                yield from self._split(file)

    def _split(self, file: SourceFile) -> Iterator[Document]:
        separator = None if self.separator is None else self.separator.encode()
        with file.open() as stream:
            if separator is None:
                yield Document(decode(read_whole(stream, file), file, 0), file.path)
                return
            start, end, first, lines = 0, 0, 1, list[bytes]()
            for number, line in enumerate(lines_of(stream, file), 1):
                end += len(line)
                if line.rstrip(b"\r\n") != separator:
                    lines.append(line)
                    check_document(end - start, file)
                    continue
                yield Document(decode(b"".join(lines), file, start).strip("\r\n"), f"{file.path} line {first}")
                start, first, lines = end, number + 1, []
            yield Document(decode(b"".join(lines), file, start).strip("\r\n"), f"{file.path} line {first}")


def decode(data: bytes, file: SourceFile, start: int) -> str:
    """The UTF-8 bytes at `start` of `file` as text, without a byte-order mark; GranaryError if they are not UTF-8."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise GranaryError(
            f"{file.path} is not UTF-8 at byte {start + error.start}: convert it, for example with iconv"
        ) from error
