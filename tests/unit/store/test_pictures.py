"""Kinds, cells and images of a store: what went in comes out, damage is found, tables of strangers are data."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.format.image_table import ImageRow, read_table
from shared.store.verify import drop_incomplete, verify
from tests.harvesting import same_files
from tests.pictured_store import Table, bytes_of, digest_of, pictured_plan, pictured_store, pictures_of
from tests.synthetic import synthetic_store, synthetic_tokens


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return pictured_store(tmp_path_factory.mktemp("pictured") / "store")


def test_what_went_in_comes_out(store: Store) -> None:
    given, order = pictures_of(store.plan), [7, 3, 3, 19, 0]
    for name in ("kind", "image", "cell"):
        wanted = getattr(given, name)
        assert np.array_equal(getattr(store.pictures, name)(order), wanted[order])
        array = zarr.open_group(store.url, mode="r")[name]
        assert array.dtype == wanted.dtype
        assert np.array_equal(np.asarray(array[:]), wanted)
    assert [row.id for row in store.pictures.rows_of(9)] == [9]
    assert store.pictures.rows_of(9)[0].box(1, 2) == (20.0, 10.0, 30.0, 20.0)
    assert store.pictures.data(digest_of(9)) == bytes_of(9)
    assert verify(store.url).intact
    assert len(list(Path(store.url, "images/files").iterdir())) == 3


def test_a_store_made_again_from_where_it_stopped_has_the_same_bytes(store: Store, tmp_path: Path) -> None:
    plan = pictured_plan()
    again = pictured_store(tmp_path / "store")
    (tmp_path / "store/extents/00000000.tokens.json").unlink()
    (tmp_path / "store/images/table/00000001.jsonl").unlink()
    Store.create(tmp_path / "store", plan, *synthetic_tokens(plan), pictures=pictures_of(plan))
    assert again.digest() == store.digest()
    assert same_files(Path(store.url), tmp_path / "store")


@pytest.mark.parametrize("key", ["kind/c/1/0", "cell/c/0/0/0", "images/table/00000002.jsonl", "file"])
def test_damage_is_found_and_taken_back(store: Store, key: str, tmp_path: Path) -> None:
    plan, url = pictured_plan(), str(shutil.copytree(store.url, tmp_path / "store"))
    file = Path(url) / (f"images/files/{digest_of(1)}" if key == "file" else key)
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    report = verify(url)
    assert [one.what for one in report.problems] == ["fails its checksum"]
    dropped = drop_incomplete(url, report)
    assert not any(one.startswith("manifest/") for one in dropped)
    Store.create(tmp_path / "store", plan, *synthetic_tokens(plan), pictures=pictures_of(plan)).finalize()
    found = verify(url)
    assert found.intact
    assert not found.foreign


def test_an_image_of_other_bytes_is_not_handed_out(store: Store, tmp_path: Path) -> None:
    copy = Store.open(shutil.copytree(store.url, tmp_path / "store"))
    (tmp_path / "store/images/files" / digest_of(1)).write_bytes(b"another")
    with pytest.raises(GranaryError, match="fails its checksum"):
        copy.pictures.data(digest_of(1))


def test_a_table_is_data() -> None:
    (row,) = read_table(Table()[0:1], "here")
    assert isinstance(row, ImageRow)
    line = row.to_line()
    for other in (
        line.replace(digest_of(0).encode(), b"../../../../etc/passwd"),
        line.replace(b'"width":30', b'"width":"30"'),
        line.replace(b'"width":30,', b""),
        b"[" * 5000,
        b"\xff\n",
        b"{}\n",
    ):
        with pytest.raises(GranaryError):
            read_table(other, "here")


def test_a_store_of_text_has_none_of_it(tmp_path: Path) -> None:
    store = synthetic_store(tmp_path / "text", pictured_plan().__class__.from_json(
        {**pictured_plan().to_json(), "provenance": {"model": {"id": "synthetic"}}}
    ))  # fmt: skip
    with pytest.raises(GranaryError, match="is of text alone"):
        store.pictures.kind([0])
    assert not {"kind", "image", "cell", "images"} & {path.name for path in (tmp_path / "text").iterdir()}
