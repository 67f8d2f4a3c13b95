"""Every kind of corpus: what it yields, in which order, and what it says about bad files."""

import bz2
import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.basics.errors import GranaryError
from stage_harvest.corpus import Chat, Document
from stage_harvest.corpus.files import find_files, fingerprint_files
from stage_harvest.corpus.hub import HubDataset
from stage_harvest.corpus.jsonl import JsonlFiles
from stage_harvest.corpus.parquet import ParquetFiles
from stage_harvest.corpus.shuffle import windowed_shuffle
from stage_harvest.corpus.stdlib import StandardLibrary
from stage_harvest.corpus.text import TextFiles
from stage_harvest.corpus.tokens import TokenFiles

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


def plain(documents: Iterator[Document]) -> list[Any]:
    """Documents as comparable values."""
    contents = [document.content for document in documents]
    return [content.tolist() if isinstance(content, np.ndarray) else content for content in contents]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Files


def test_globs_folders_and_urls(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "d.md"):
        write(tmp_path / name, name)
    assert [file.name for file in find_files(f"{tmp_path}/*.txt")] == ["a.txt", "b.txt"]
    assert [file.name for file in find_files(f"{tmp_path}/**/*.txt")] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [file.name for file in find_files(str(tmp_path))] == ["a.txt", "b.txt", "d.md", "sub/c.txt"]
    fsspec.filesystem("memory").pipe("/corpus/x.txt", b"from memory")
    assert plain(TextFiles("memory://corpus/*.txt").documents()) == ["from memory"]


def test_fingerprint_follows_content_and_not_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "there"):
        for name in ("a.txt", "b.txt"):
            write(tmp_path / place / name, name * 100)
    first = TextFiles(f"{tmp_path}/here/*")
    assert TextFiles(f"{tmp_path}/there/*").fingerprint() == first.fingerprint()
    assert TextFiles(f"{tmp_path}/there/*").description == first.description == "text: a.txt and 1 more, 1000 bytes"
    write(tmp_path / "there/b.txt", "b.txt" * 99 + "b.tyt")
    assert TextFiles(f"{tmp_path}/there/*").fingerprint() != first.fingerprint()
    monkeypatch.setattr("stage_harvest.corpus.files.FULL_HASH_BYTES", 10)
    monkeypatch.setattr("stage_harvest.corpus.files.HEAD_BYTES", 10)
    assert fingerprint_files(find_files(f"{tmp_path}/there/*")) == fingerprint_files(find_files(f"{tmp_path}/here/*"))


def test_a_path_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    for name in ("data [v1]/a.jsonl", "data [v1]/b*.jsonl", "data [v1]/c.txt"):
        write(tmp_path / name, "text")
    assert [file.name for file in find_files(f"{tmp_path}/data [v1]/a.jsonl")] == ["a.jsonl"]
    assert [file.name for file in find_files(f"{tmp_path}/data [v1]/b*.jsonl")] == ["b*.jsonl"]
    assert [file.name for file in find_files(f"{tmp_path}/data [v1]")] == ["a.jsonl", "b*.jsonl", "c.txt"]
    assert [file.name for file in find_files(f"{tmp_path}/data [v1]/*.jsonl")] == ["a.jsonl", "b*.jsonl"]
    assert [file.name for file in find_files(f"{tmp_path}/data [v1]/[ac].*")] == ["a.jsonl", "c.txt"]


def test_a_folder_is_read_without_what_lies_beside_the_corpus(tmp_path: Path) -> None:
    for name in ("a.jsonl", "sub/b.jsonl.gz", "README.md", ".hidden.jsonl", ".cache/c.jsonl", "state.json.lock"):
        write(tmp_path / name, "text")
    jsonl = (".jsonl",)
    assert [file.name for file in find_files(str(tmp_path), jsonl)] == ["a.jsonl", "sub/b.jsonl.gz"]
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl", "state.json.lock", "sub/b.jsonl.gz"]
    assert [file.name for file in find_files(f"{tmp_path}/sub", (".parquet",))] == ["b.jsonl.gz"]  # none ends so
    assert [file.name for file in find_files(f"{tmp_path}/README.md", jsonl)] == ["README.md"]
    assert [file.name for file in find_files(f"{tmp_path}/.hidden*", jsonl)] == [".hidden.jsonl"]


def test_no_file_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(GranaryError, match=r"no file matches corpus\.files=.*/\*\.txt"):
        find_files(f"{tmp_path}/*.txt")
    with pytest.raises(GranaryError, match="no file matches"):
        find_files(f"{tmp_path}/missing.txt")
    write(tmp_path / "a.txt", "")
    with pytest.raises(GranaryError, match=r"a\.txt is empty"):
        find_files(f"{tmp_path}/*.txt")
    write(tmp_path / "b.txt", "text")
    assert plain(TextFiles(f"{tmp_path}/*.txt").documents()) == ["text"]
    with pytest.raises(GranaryError, match="nosuchprotocol"):
        find_files("nosuchprotocol://bucket/*.txt")


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


COMPRESSORS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_whole_joined_and_torn(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": hashlib.sha256(bytes([i])).hexdigest()}).encode() + b"\n" for i in range(200)]
    halves = [COMPRESSORS[suffix](b"".join(part)) for part in (lines[:100], lines[100:])]
    path = write(tmp_path / f"x.jsonl.{suffix}", b"".join(halves))  # two streams one after the other, as tools write
    assert plain(JsonlFiles(path, "text").documents()) == [json.loads(line)["text"] for line in lines]
    torn = write(tmp_path / f"torn.jsonl.{suffix}", halves[0][: len(halves[0]) // 2])
    for source in (JsonlFiles(torn, "text"), TextFiles(torn), TextFiles(torn, "---")):
        with pytest.raises(GranaryError, match=rf"torn\.jsonl\.{suffix} can't be read to its end: "):
            plain(source.documents())


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    source = TextFiles(path)
    Path(path).unlink()
    for read in (source.fingerprint, lambda: plain(source.documents())):
        with pytest.raises(GranaryError, match=r"a\.txt can't be read to its end: .*No such file"):
            read()


# Text


def test_separated_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "one\ntwo\n<|end|>\n\nthree <|end|>\n<|end|>\r\nfour")
    assert plain(TextFiles(path, "<|end|>").documents()) == ["one\ntwo", "three <|end|>", "four"]
    assert len(plain(TextFiles(path).documents())) == 1
    zipped = write(tmp_path / "t.txt.gz", gzip.compress(b"one\n<|end|>\ntwo"))
    assert plain(TextFiles(zipped, "<|end|>").documents()) == ["one", "two"]


@pytest.mark.parametrize("separator", [None, "---"])
def test_invalid_utf8_is_found(tmp_path: Path, separator: str | None) -> None:
    path = write(tmp_path / "bad.txt", b"fine\n---\nalso fine\n---\nab\xffcd\n")
    with pytest.raises(GranaryError, match=r"bad\.txt is not UTF-8 at byte 25"):
        plain(TextFiles(path, separator).documents())


# JSON lines


def test_jsonl(tmp_path: Path) -> None:
    records = [{"text": "a\nb"}, {"text": None}, {"text": MESSAGES}, {"text": [3, 4]}, {"text": "z"}]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    assert plain(JsonlFiles(path, "text").documents()) == ["a\nb", Chat(MESSAGES), [3, 4], "z"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 3}', r"bad\.jsonl line 2 has no field 'text': there are body, id"),
        (b'["text"]', r"line 2 has no field 'text': there are list"),
        (b'{"text": "a", "n": 1' + b"0" * 5000 + b"}", r"bad\.jsonl line 2 can't be read: Exceeds the limit"),
        (b'{"text": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", r"bad\.jsonl line 2 is nested too deeply"),
        (b'{"text": [3, 4.5]}', r"line 2, field 'text' holds a list of float and int"),
        (b'{"text": [true, false]}', r"line 2, field 'text' holds a list of bool"),
        (b'{"text": [1' + b"0" * 30 + b"]}", r"line 2, field 'text' holds 10+, which is no token id"),
        (b'{"text": [{"who": "me"}]}', r"line 2, field 'text', message 1 has the keys who: a message needs role"),
        (b'{"text": [{"from": "narrator", "value": "x"}]}', r"message 1 is from 'narrator': known are human"),
        (b'{"text": ', r"line 2 is not JSON: Expecting value at column"),
        (b'{"text": "a\xff"}', r"bad\.jsonl is not UTF-8 at byte 26"),
        (b'{"text": 3}', r"line 2, field 'text' holds int: it must be text, chat messages.* or token ids"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(GranaryError, match=message):
        plain(JsonlFiles(path, "text").documents())


def test_a_field_inside_records_and_one_with_a_dot_in_its_name(tmp_path: Path) -> None:
    records = [{"meta": {"text": "inner"}}, {"meta": None}, {"meta.text": "named so", "meta": {"text": "not this"}}]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records)))
    assert plain(JsonlFiles(path, "meta.text").documents()) == ["inner", "named so"]
    with pytest.raises(GranaryError, match=r"line 1 has no field 'meta\.body': there are text in meta"):
        plain(JsonlFiles(path, "meta.body").documents())


def test_sharegpt_messages_are_chats(tmp_path: Path) -> None:
    talk = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "id": 1}]
    path = write(tmp_path / "x.jsonl", json.dumps({"conversations": talk}))
    pq.write_table(pa.table({"conversations": [talk]}), tmp_path / "x.parquet")
    wanted = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "id": 1},
    ]
    assert plain(JsonlFiles(path, "conversations").documents()) == [Chat(wanted)]
    assert plain(ParquetFiles(f"{tmp_path}/x.parquet", "conversations").documents()) == [Chat(wanted)]


def test_an_empty_list_leaves_no_trace(tmp_path: Path) -> None:
    rows = [[5, 6], [], [7]]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps({"ids": row}) for row in rows))
    pq.write_table(pa.table({"ids": rows, "chat": [MESSAGES, [], None]}), tmp_path / "x.parquet")
    assert plain(JsonlFiles(path, "ids").documents()) == [[5, 6], [7]]
    assert plain(ParquetFiles(f"{tmp_path}/x.parquet", "ids").documents()) == [[5, 6], [7]]
    assert plain(ParquetFiles(f"{tmp_path}/x.parquet", "chat").documents()) == [Chat(MESSAGES)]


def test_documents_know_their_place(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\n\n{"text": null}\n{"text": "b"}\n')
    assert [d.where for d in JsonlFiles(path, "text").documents()] == [f"{path} line 1", f"{path} line 4"]
    text = write(tmp_path / "t.txt", "one\ntwo\n---\nthree\n---\nfour")
    assert [d.where for d in TextFiles(text, "---").documents()] == [f"{text} line {n}" for n in (1, 4, 6)]
    pq.write_table(pa.table({"text": [str(i) for i in range(3000)]}), tmp_path / "x.parquet", row_group_size=700)
    assert [d.where for d in ParquetFiles(f"{tmp_path}/x.parquet", "text").documents()] == [
        f"{tmp_path}/x.parquet row {n}" for n in range(1, 3001)
    ]
    np.save(tmp_path / "flat.npy", np.array([5, 6, 2, 7, 2]))
    ids = f"{tmp_path}/flat.npy"
    assert [d.where for d in TokenFiles(ids, "uint16", 2).documents()] == [f"{ids} from id 0", f"{ids} from id 3"]


# Columns


def test_keys_that_arrow_filled_with_nulls_are_taken_out_again(tmp_path: Path) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"city": "R"}}}],
    }
    other = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": {"day": 3}}}]}
    chats = [[MESSAGES[0], call], [MESSAGES[0], other], MESSAGES]
    path = write(tmp_path / "x.jsonl", "\n".join(json.dumps({"m": chat}) for chat in chats))
    pq.write_table(pa.table({"m": pa.array(chats)}), tmp_path / "x.parquet")
    wanted = [Chat(chat) for chat in chats]
    assert plain(JsonlFiles(path, "m").documents()) == wanted
    assert plain(ParquetFiles(f"{tmp_path}/x.parquet", "m").documents()) == wanted


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1.5, 2.5], r"x\.parquet, column 'c' is of type double: it must hold text, chat messages"),
        ([b"a", b"b"], "is of type binary"),
        ([["a"], ["b"]], r"is of type list<.*string>"),
        ([[1, None], [2]], r"row 1, column 'c' holds a list of NoneType and int"),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path: Path, column: list[Any], message: str) -> None:
    pq.write_table(pa.table({"c": column}), tmp_path / "x.parquet")
    with pytest.raises(GranaryError, match=message):
        plain(ParquetFiles(f"{tmp_path}/x.parquet", "c").documents())


def test_columns_of_every_spelling_of_a_type(tmp_path: Path) -> None:
    table = pa.table(
        {
            "large": pa.array(["a", "b"], pa.large_string()),
            "codes": pa.array(["a", "b"]).dictionary_encode(),
            "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int16(), 2)),
            "none": pa.nulls(2),
            "meta": [{"text": "x", "deep": {"ids": [1]}}, None],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    wanted = {"large": ["a", "b"], "codes": ["a", "b"], "fixed": [[1, 2], [3, 4]], "none": []}
    for column, values in {**wanted, "meta.text": ["x"], "meta.deep.ids": [[1]]}.items():
        assert plain(ParquetFiles(f"{tmp_path}/x.parquet", column).documents()) == values, column
    with pytest.raises(GranaryError, match=r"no column 'meta\.body': there are text, deep in meta"):
        plain(ParquetFiles(f"{tmp_path}/x.parquet", "meta.body").documents())


def test_arrow_streams_and_files(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "meta": [{"ids": [1]}, {"ids": [2]}, {"ids": [3]}]})
    with pa.OSFile(f"{tmp_path}/s.arrow", "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(f"{tmp_path}/f.feather", "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("s.arrow", "f.feather"):
        assert plain(ParquetFiles(f"{tmp_path}/{name}", "text").documents()) == ["a", "b", "c"]
        assert plain(ParquetFiles(f"{tmp_path}/{name}", "meta.ids").documents()) == [[1], [2], [3]]
    with pytest.raises(GranaryError, match=r"x\.arrow is not an Arrow file"):
        plain(ParquetFiles(write(tmp_path / "x.arrow", "nothing of the kind"), "text").documents())


# Parquet


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "b"], "chat": [MESSAGES, None, MESSAGES], "ids": [[1, 2], [3], None]})
    pq.write_table(table, tmp_path / "t.parquet")
    path = str(tmp_path / "t.parquet")
    assert plain(ParquetFiles(path, "text").documents()) == ["a", "b"]
    assert plain(ParquetFiles(path, "chat").documents()) == [Chat(MESSAGES), Chat(MESSAGES)]
    assert plain(ParquetFiles(path, "ids").documents()) == [[1, 2], [3]]
    with pytest.raises(GranaryError, match=r"t\.parquet has no column 'body': there are text, chat, ids"):
        plain(ParquetFiles(path, "body").documents())
    with pytest.raises(GranaryError, match=r"x\.parquet is not a parquet file"):
        plain(ParquetFiles(write(tmp_path / "x.parquet", "nothing of the kind"), "text").documents())
    torn = bytearray((tmp_path / "t.parquet").read_bytes())
    torn[4:40] = bytes(36)  # the first page
    with pytest.raises(GranaryError, match=r"y\.parquet can't be read to its end"):
        plain(ParquetFiles(write(tmp_path / "y.parquet", bytes(torn)), "text").documents())


# Hub


def test_hub_dataset_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "data/train.jsonl", "\n".join(json.dumps({"text": text}) for text in "abc"))
    dataset = HubDataset(str(tmp_path / "data"), None, "train", None, "text")
    assert plain(dataset.documents()) == ["a", "b", "c"]
    with pytest.raises(GranaryError, match="has no column 'body': there are text"):
        plain(HubDataset(str(tmp_path / "data"), None, "train", None, "body").documents())
    with pytest.raises(GranaryError, match="can't be opened"):
        plain(HubDataset(str(tmp_path / "data"), None, "test", None, "text").documents())
    write(tmp_path / "torn/train.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-4])
    with pytest.raises(GranaryError, match=r"torn can't be (opened|read to its end): Compressed file ended"):
        plain(HubDataset(str(tmp_path / "torn"), None, "train", None, "text").documents())
    assert dataset.fingerprint() != HubDataset(str(tmp_path / "data"), None, "train", "v2", "text").fingerprint()


def test_what_datasets_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "m": [MESSAGES, MESSAGES]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "splits")
    assert plain(HubDataset(str(tmp_path / "one"), None, "train", None, "text").documents()) == ["a", "b"]
    assert plain(HubDataset(str(tmp_path / "splits"), None, "test", None, "text").documents()) == ["b"]
    with pytest.raises(GranaryError, match=r"splits has no split 'dev': there are train, test"):
        plain(HubDataset(str(tmp_path / "splits"), None, "dev", None, "text").documents())
    assert plain(ParquetFiles(str(tmp_path / "one"), "text").documents()) == ["a", "b"]  # its Arrow files alone


def test_hub_rows_are_read_as_columns_are(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("zstandard")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    records = [{"m": [*MESSAGES, call], "meta": {"text": "x"}}, {"m": MESSAGES, "meta": {"text": "y"}}]
    write(tmp_path / "data/train.jsonl.zst", zstd("\n".join(map(json.dumps, records)).encode()))
    folder = str(tmp_path / "data")
    assert plain(HubDataset(folder, None, "train", None, "m").documents()) == [Chat(r["m"]) for r in records]
    assert plain(HubDataset(folder, None, "train", None, "meta.text").documents()) == ["x", "y"]


# Standard library


def test_stdlib() -> None:
    library = StandardLibrary("heldout", include_tests=False)
    documents = plain(library.documents())
    assert len(documents) > 3
    shuffled = plain(library.documents(random.Random(1)))
    assert sorted(shuffled) == sorted(documents)
    assert plain(library.documents(random.Random(1))) == shuffled != documents
    assert library.fingerprint() == StandardLibrary("heldout", include_tests=False).fingerprint()


# Token ids


def test_token_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "flat.npy", np.array([5, 6, 2, 7, 2, 2, 8], np.uint16))
    np.save(tmp_path / "rows.npy", np.array([[1, 2], [3, 4]]))
    raw = write(tmp_path / "raw.bin", np.array([70_000, 2, 3], "<u4").tobytes())
    assert plain(TokenFiles(f"{tmp_path}/flat.npy", "uint16", 2).documents()) == [[5, 6, 2], [7, 2], [2], [8]]
    assert plain(TokenFiles(f"{tmp_path}/flat.npy", "uint16", None).documents()) == [[5, 6, 2, 7, 2, 2, 8]]
    assert plain(TokenFiles(f"{tmp_path}/rows.npy", "uint16", None).documents()) == [[1, 2], [3, 4]]
    assert plain(TokenFiles(raw, "uint32", 2).documents()) == [[70_000, 2], [3]]
    for name in ("flat.npy", "raw.bin"):
        fsspec.filesystem("memory").pipe(f"/tokens/{name}", (tmp_path / name).read_bytes())
    assert plain(TokenFiles("memory://tokens/raw.bin", "uint32", None).documents()) == [[70_000, 2, 3]]
    assert plain(TokenFiles("memory://tokens/flat.npy", "uint32", 2).documents())[0] == [5, 6, 2]


def test_bad_token_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.zeros(3))
    with pytest.raises(GranaryError, match=r"float\.npy is 1-D float64"):
        plain(TokenFiles(f"{tmp_path}/float.npy", "uint16", None).documents())
    with pytest.raises(GranaryError, match="no whole number of uint32"):
        plain(TokenFiles(write(tmp_path / "odd.bin", b"12345"), "uint32", None).documents())
    with pytest.raises(GranaryError, match="not an array of token ids"):
        plain(TokenFiles(write(tmp_path / "text.npy", "text"), "uint32", None).documents())
    with pytest.raises(GranaryError, match=r"corpus\.dtype='float16': choose from uint16"):
        TokenFiles(f"{tmp_path}/float.npy", "float16", None)


# Order


@pytest.mark.parametrize("window", [1, 4, 7, 100])
def test_windowed_shuffle(window: int) -> None:
    def shuffled(seed: int) -> list[int]:
        return list(windowed_shuffle(range(50), window, random.Random(seed)))

    assert sorted(shuffled(0)) == list(range(50))
    assert shuffled(0) == shuffled(0)
    if window == 1:
        assert shuffled(0) == list(range(50))
    else:
        assert shuffled(0) != shuffled(1)
    # Bounded memory: an item never comes out before the window has reached it.
    assert all(item < place + window for place, item in enumerate(shuffled(0)))
