"""A latents folder that is written is read back; what a stranger may have changed is refused."""

import gc
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from shared.basics.errors import GranaryError
from shared.latents import layout
from shared.latents.folder import Latents
from tests.latents import AFTER, BEFORE, SEQ_LEN, WINDOW, synthetic_latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return synthetic_latents(tmp_path_factory.mktemp("latents") / "folder")


def test_zarr_reads_the_same_arrays(latents: Latents) -> None:
    group = zarr.open_group(latents.url, mode="r", zarr_format=3)
    for path in layout.ARRAYS.keys() - layout.PICTURED:  # those: tests/unit/inspect/test_pictures.py
        ours = latents.array(path).all()
        assert np.array_equal(np.asarray(group[path]), ours), path
        assert np.array_equal(latents.array(path).rows(3, 7), ours[3:7]), path


def test_rows_of_many_chunks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.latents import arrays
    from shared.store.io.open import open_io

    monkeypatch.setattr(arrays, "CHUNKS_PER_SHARD", 3)
    spec, rows = layout.ArraySpec("int32", ("N", "2"), 4), np.arange(2 * 53).reshape(53, 2)
    writer = arrays.ArrayWriter(open_io(tmp_path), "a", spec, (2,))
    for start in range(0, 53, 7):
        writer.append(rows[start : start + 7])
    writer.close()
    for cache in (arrays.ChunkCache(), arrays.ChunkCache(1)):
        reader = arrays.ArrayReader(open_io(tmp_path), "a", spec, (2,), cache)
        assert np.array_equal(reader.all(), rows)
        assert np.array_equal(reader.rows(10, 31), rows[10:31])
        order = np.random.default_rng(0).permutation(53)[:20]
        assert np.array_equal(reader.take(order), rows[order])
        with pytest.raises(GranaryError, match="has no row 53"):
            reader.take(np.array([53]))
    assert np.array_equal(np.asarray(zarr.open_array(tmp_path / "a", mode="r")), rows)


def test_what_a_latent_is(latents: Latents) -> None:
    found = latents.latent(1)
    assert found.numbers["fired"] == latents.table["fired"][1]
    assert [one.latent for one in found.jaccard][:3] == [2, 3, 4]
    assert found.tokens[0].share == found.tokens[0].count / min(64, found.numbers["fired"])
    assert len(found.promoted) == layout.LOGITS
    assert latents.neighbours(1)[0].latent == 2
    with pytest.raises(GranaryError, match="latent 12 is not there"):
        latents.latent(12)
    assert latents.top(3) == latents.sample(3) == []


def test_examples_show_their_own_tokens(latents: Latents) -> None:
    tokens = latents.array("windows/tokens").all()
    records, num_top = latents.records(1)
    examples = latents.top(1)
    assert len(examples) == num_top == 5
    for number, one in enumerate(examples):
        window, position = int(records.window[number]), int(records.position[number])
        assert one.tokens[one.peak] == tokens[window, position]
        assert one.position == window * WINDOW % SEQ_LEN + position
        half = SEQ_LEN // 2
        low = max(one.position - BEFORE, one.position // half * half)
        end = half if one.position < half else SEQ_LEN - 3
        high = min(one.position + AFTER + 1, end)
        assert (one.start, len(one.tokens)) == (low, high - low)
        beside = one.values[one.peak : one.peak + 3] / one.value
        assert np.allclose(beside, [1, 0.5, 0.125][: len(beside)], rtol=1e-3)
        assert np.count_nonzero(one.values) == len(beside)
        assert sum(piece.stop - piece.start for piece in one.pieces) == len(one.tokens)
    assert [one.value for one in examples] == sorted((one.value for one in examples), reverse=True)


def test_deciles_divide_the_sample(latents: Latents) -> None:
    whole = [one.value for one in latents.sample(2)]
    parts = [[one.value for one in latents.sample(2, quantile=quantile)] for quantile in range(10)]
    assert [value for part in parts for value in part] == whole
    assert len(latents.sample(2, count=4)) == 4
    with pytest.raises(GranaryError, match="quantile=10"):
        latents.sample(2, quantile=10)


def test_silent_windows_are_those_where_it_was_not_seen(latents: Latents) -> None:
    shown = latents.silent(1, 100)
    pool, fired = latents.array("silent/window").all(), latents.records(1)[0].window
    assert len(shown) == len(np.setdiff1d(pool, fired)) > 0
    assert all(not one.values.any() for one in shown)


def test_find_by_token(latents: Latents) -> None:
    listed = latents.array("tokens/firing").all()
    token = int(listed[5, 0])
    assert {one.latent for one in latents.find(token=token)} == set(np.flatnonzero((listed == token).any(1)))
    assert latents.find(token="word7") == latents.find(token=" word7")
    with pytest.raises(GranaryError, match="is no token"):
        latents.find(token="nowhere to be found")


@pytest.mark.parametrize("damage", ["flip", "short", "shape", "meta"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    latents = synthetic_latents(tmp_path / "folder")
    path = tmp_path / "folder" / "histogram"
    chunk, document = path / "c" / "0" / "0", path / "zarr.json"
    if damage == "flip":
        data = bytearray(chunk.read_bytes())
        data[30] ^= 1
        chunk.write_bytes(data)
    elif damage == "short":
        chunk.write_bytes(chunk.read_bytes()[:-100])
    elif damage == "shape":
        record = json.loads(document.read_text())
        record["shape"] = [12, 1 << 40]
        document.write_text(json.dumps(record))
    else:
        (tmp_path / "folder" / "meta.json").write_text('{"granary_latents": 1}')
        with pytest.raises(GranaryError, match="is damaged"):
            Latents.open(tmp_path / "folder")
        return
    with pytest.raises(GranaryError, match="the latents folder is damaged; run granary inspect again"):
        latents.array("histogram").all()


def test_there_is_no_folder_before_its_last_file(tmp_path: Path) -> None:
    synthetic_latents(tmp_path)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(GranaryError, match="no latents folder at"):
        Latents.open(tmp_path)


def test_a_row_of_the_table_is_that_of_the_whole(latents: Latents) -> None:
    fresh = Latents.open(latents.url)
    alone = fresh.latent(5).numbers
    assert "table" not in fresh.__dict__
    assert alone == {name: column[5].item() for name, column in fresh.table.items()} == fresh.latent(5).numbers


def test_at_a_url_it_is_read_by_ranges(latents: Latents) -> None:
    latents.notes.set_note(1, "from here")
    fsspec.filesystem("memory").put(latents.url, "/folder", recursive=True)
    there = Latents.open("memory://folder")
    assert [one.marked for one in there.top(1)] == [one.marked for one in latents.top(1)]
    assert there.latent(1).numbers == latents.latent(1).numbers
    assert there.notes.note(1) == "from here"
    with pytest.raises(GranaryError, match="copy the latents folder"):
        there.notes.set_note(1, "x")
    copy = there.notes.path
    assert copy.exists()
    del there
    gc.collect()
    assert not copy.parent.exists()
    latents.notes.set_note(1, "")
