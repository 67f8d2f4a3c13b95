"""Files that decompress to more than memory holds, and pipes in the place of files."""

import gzip
import os
from pathlib import Path

import pyarrow
import pytest

from shared.basics.errors import GranaryError
from stage_harvest.corpus import files
from stage_harvest.corpus.jsonl import JsonlFiles
from stage_harvest.corpus.text import TextFiles


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(("name", "separator"), [("a.txt.gz", None), ("a.txt.gz", "---"), ("a.jsonl.zst", None)])
def test_what_decompresses_to_more_than_memory_holds_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, separator: str | None
) -> None:
    monkeypatch.setattr(files, "MOST_DOCUMENT_BYTES", 100_000)
    content = b'{"text": "' + b"a" * 10_000_000 + b'"}'
    zstd = pyarrow.Codec("zstd")
    (tmp_path / name).write_bytes(
        gzip.compress(content) if name.endswith(".gz") else zstd.compress(content, asbytes=True)
    )
    source = JsonlFiles(str(tmp_path / name), "text") if "json" in name else TextFiles(str(tmp_path / name), separator)
    with pytest.raises(GranaryError, match=rf"{name} holds a document of more than 100,000 bytes"):
        list(source.documents())


def test_many_lines_make_no_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_DOCUMENT_BYTES", 100)
    path = write(tmp_path / "a.txt", "0123456789\n" * 9 + "---\n" + "0123456789\n" * 9)
    assert len(list(TextFiles(path, "---").documents())) == 2
    with pytest.raises(GranaryError, match="a document of more than 100 bytes"):
        list(TextFiles(write(tmp_path / "b.txt", "0123456789\n" * 10), "---").documents())


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(GranaryError, match="no file matches"):
        TextFiles(str(tmp_path / "a.txt"))
    with pytest.raises(GranaryError, match="no file matches"):
        TextFiles(str(tmp_path))
    write(tmp_path / "b.txt", "text")
    assert [document.content for document in TextFiles(str(tmp_path)).documents()] == ["text"]
