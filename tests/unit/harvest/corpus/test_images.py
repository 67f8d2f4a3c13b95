"""Rows with images: parquet as Hugging Face writes it, JSON lines with paths, and rows of text alone among them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.basics.errors import GranaryError
from stage_harvest.config import JsonlCorpus, MixtureCorpus
from stage_harvest.corpus import Chat, Pictured, open_corpus
from stage_harvest.corpus.hub import HubDataset
from stage_harvest.corpus.jsonl import JsonlFiles
from stage_harvest.corpus.parquet import ParquetFiles

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def rows(source: Any) -> list[Pictured]:
    found = [document.content for document in source.documents()]
    assert all(isinstance(one, Pictured) for one in found)
    return found


def seen(found: list[Pictured]) -> list[Any]:
    return [(one.text, [image.data for image in one.images], one.row) for one in found]


def test_parquet_and_json_lines_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"a")
    images = [[{"bytes": b"a", "path": "a.png"}, {"bytes": b"b", "path": None}], None, [], [{"bytes": b"a"}]]
    texts = [MESSAGES, MESSAGES, MESSAGES, None]
    table = pa.table({"messages": texts, "images": pa.array(images, pa.list_(IMAGE)), "id": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    found = rows(ParquetFiles(str(tmp_path / "rows.parquet"), "messages", "images"))
    chat = Chat(MESSAGES)
    assert seen(found) == [(chat, [b"a", b"b"], "rows.parquet row 1"), (chat, [], "rows.parquet row 2"),
                           (chat, [], "rows.parquet row 3")]  # fmt: skip
    assert [image.where for image in found[0].images] == [f"{tmp_path}/rows.parquet row 1, image {n}" for n in (1, 2)]
    lines = [
        {"messages": MESSAGES, "images": ["pictures/a.png"]},
        {"messages": "text", "images": None},
        {"messages": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = rows(JsonlFiles(str(tmp_path / "rows.jsonl"), "messages", "images"))
    assert seen(found) == [(chat, [b"a"], "rows.jsonl line 1"), ("text", [], "rows.jsonl line 2"),
                           ("x", [], "rows.jsonl line 3")]  # fmt: skip
    assert found[0].images[0].path == "pictures/a.png"


@pytest.mark.parametrize("kind", [pa.binary(), IMAGE, pa.list_(pa.binary())])
def test_a_column_of_single_images_or_bare_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    value: Any = b"a" if kind == pa.binary() else [b"a"] if pa.types.is_list(kind) else {"bytes": b"a", "path": None}
    pq.write_table(pa.table({"text": ["x"], "image": pa.array([value], kind)}), tmp_path / "rows.parquet")
    (row,) = rows(ParquetFiles(str(tmp_path / "rows.parquet"), "text", "image"))
    assert [image.data for image in row.images] == [b"a"]


def test_what_is_wrong_is_one_line_with_its_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for line, told in (
        (
            {"text": "x", "images": ["gone.png"]},
            r"rows\.jsonl line 1, image 1: the image gone\.png in .*: No such file",
        ),
        ({"text": [1, 2], "images": ["gone.png"]}, r"rows\.jsonl line 1 holds token ids beside 'images'"),
        ({"text": "x", "images": [5]}, r"rows\.jsonl line 1, image 1 holds no image"),
    ):
        file.write_text(json.dumps(line))
        with pytest.raises(GranaryError, match=told):
            rows(JsonlFiles(str(file), "text", "images"))
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(GranaryError, match="has no column 'images': there are text"):
        rows(ParquetFiles(str(tmp_path / "rows.parquet"), "text", "images"))
    part = {"kind": "jsonl", "files": str(file), "field": "text", "images": "images", "weight": 1}
    with pytest.raises(GranaryError, match=r"corpus\.parts\.a\.images: a mixture takes no images"):
        open_corpus(MixtureCorpus(contexts=None, shuffle=False, shuffle_window=1, parts={"a": part}))


def test_without_the_column_a_corpus_is_described_as_ever(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    plain = JsonlCorpus(
        contexts=None, shuffle=False, shuffle_window=1, files=str(tmp_path / "rows.jsonl"), field="text", images=None
    )
    assert open_corpus(plain).description == "jsonl: rows.jsonl, 13 bytes, field text"


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_hub_rows_give_the_bytes_as_they_are_stored(single: bool, saved: bool, tmp_path: Path) -> None:
    """Also where the data set's own type would decode them, and decoded pixels are no file again."""
    datasets = pytest.importorskip("datasets")
    from tests.picture_corpus import picture  # needs pillow

    png = picture(5)
    values: list[Any] = [{"bytes": png, "path": None}, None]
    kind = datasets.Image() if single else datasets.List(datasets.Image())
    images = values if single else [[values[0], values[0]], []]
    features = datasets.Features({"text": datasets.Value("string"), "images": kind})
    made = datasets.Dataset.from_dict({"text": ["x", "y"], "images": images}, features=features)
    (tmp_path / "data").mkdir()
    if saved:
        made.save_to_disk(tmp_path / "data")
    else:
        made.to_parquet(tmp_path / "data" / "train.parquet")
    found = rows(HubDataset(str(tmp_path / "data"), None, "train", None, "text", "images"))
    assert seen(found) == [("x", [png] * (1 if single else 2), "row 1"), ("y", [], "row 2")]
    with pytest.raises(GranaryError, match="has no column 'pictures': there are text, images"):
        rows(HubDataset(str(tmp_path / "data"), None, "train", None, "text", "pictures"))


def test_hub_rows_name_no_file_of_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    line = {"text": "x", "images": ["/etc/passwd"]}
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(GranaryError, match="/etc/passwd names a file, and the corpus lies in no local folder"):
        rows(HubDataset(str(tmp_path / "data"), None, "train", None, "text", "images"))
