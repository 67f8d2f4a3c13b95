"""Pictures of a multimodal store against loops over single regions; damage and what strangers may have changed."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.latents import layout
from shared.latents.folder import Latents
from shared.sae.loading import load
from shared.store import Store
from stage_inspect import job as jobs
from stage_inspect.inspect import inspect
from stage_inspect.scan import batches
from tests.inspection import content, inspect_config
from tests.pictured_run import LATENTS, pictured_run
from tests.pictured_store import bytes_of, digest_of

pytest.importorskip("PIL")
TOP = 4
Region = tuple[int, int, int, int, float]  # image row, cell row, column, position, activation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with several parts and batches."""
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "PART_TOKENS", 200)
        patch.setattr(batches, "BATCH_TOKENS", 64)
        pictured_run(folder, **{"latents.top": TOP})
    return folder


@pytest.fixture(scope="module")
def slow(folder: Path) -> dict[int, dict[tuple[int, int, str], list[Region]]]:
    """By latent, then by (context, document, image): the regions on which it fires."""
    store, sae = Store.open(folder / "store"), load(folder / "sae")
    found: dict[int, dict[tuple[int, int, str], list[Region]]] = {latent: {} for latent in range(LATENTS)}
    for context in range(store.num_contexts):
        mask, segments = store.mask([context])[0], store.segments([context])[0]
        kind, image, cell = (getattr(store.pictures, name)([context])[0] for name in ("kind", "image", "cell"))
        latents = sae.encode(store.read_context(store.hooks[0], context).float())
        for t in range(store.seq_len):
            if not mask[t] or segments[t] < 0 or kind[t] & 7 != 3:
                continue
            for latent, value in zip(latents.indices[t].tolist(), latents.values[t].tolist(), strict=True):
                if latent >= 0:
                    key = (context, int(segments[t]), digest_of(int(image[t])))
                    region = (int(image[t]), int(cell[t][0]), int(cell[t][1]), t, value)
                    found[latent].setdefault(key, []).append(region)
    return found


def strength_and_place(item: tuple[tuple[int, int, str], list[Region]]) -> tuple[float, int, int]:
    (context, *_), regions = item
    largest = max(region[4] for region in regions)
    return -largest, context, min(region[3] for region in regions if region[4] == largest)


def read_all(latents: Latents) -> None:
    """Everything of pictures that a page reads."""
    for latent in range(LATENTS):
        assert latents.latent(latent).numbers
        assert latents.top(latent)
        for one in latents.pictures(latent):
            latents.thumbnail(one.thumbnail)


def test_pictures_are_those_of_brute_force(folder: Path, slow: dict) -> None:
    latents, store = Latents.open(folder / "latents"), Store.open(folder / "store")
    shown = 0
    for latent in range(LATENTS):
        wanted = sorted(slow[latent].items(), key=strength_and_place)[:TOP]
        pictures = latents.pictures(latent)
        assert [(one.context, one.sha256) for one in pictures] == [(key[0], key[2]) for key, _ in wanted]
        for one, ((context, document, sha), regions) in zip(pictures, wanted, strict=True):
            assert one.value == np.float32(max(region[4] for region in regions))
            mine = [(one.grids[grid].row, *cell) for grid, cell in zip(one.grid, one.cell.tolist(), strict=True)]
            assert mine == [region[:3] for region in regions]
            assert np.allclose(one.values, [region[4] for region in regions], rtol=2e-3)
            row = store.pictures.rows_of(context)[0]
            assert [tuple(box) for box in one.boxes] == [row.box(*region[1:3]) for region in regions]
            assert (one.width, one.height) == (30, 20)
            segments, tokens = store.segments([context])[0], store.tokens([context])[0]
            kind, image = store.pictures.kind([context])[0], store.pictures.image([context])[0]
            own = [t for t in range(32) if segments[t] == document]
            seen = [t for t in own if kind[t] & 7 == 3 and digest_of(int(image[t])) == sha]
            text = [t for t in own if kind[t] & 7 in (1, 2)]
            assert one.position == seen[0]
            assert one.before.tolist() == [tokens[t] for t in text if t < seen[0]][-16:]
            assert one.after.tolist() == [tokens[t] for t in text if t > seen[-1]][:16]
            shown += 1
    assert shown > LATENTS
    assert latents.pictures(0, 2, start=1) == [] or len(latents.pictures(0, 2, start=1)) <= 2


def test_shares_of_firing_are_counted_by_kind(folder: Path, slow: dict) -> None:
    latents, store = Latents.open(folder / "latents"), Store.open(folder / "store")
    sae = load(folder / "sae")
    counts: dict[str, Counter[int]] = {kind: Counter() for kind in layout.KINDS}
    totals: Counter[str] = Counter()
    for context in range(store.num_contexts):
        fired = sae.encode(store.read_context(store.hooks[0], context).float()).indices
        mask = store.mask([context])[0]
        for kind in layout.KINDS:
            at = np.flatnonzero(store.pictures.chosen([context], [kind])[0] & mask)
            totals[kind] += len(at)
            counts[kind].update(index for index in fired[at].flatten().tolist() if index >= 0)
    for kind in layout.KINDS:
        assert latents.table[f"fired_{kind}"].tolist() == [counts[kind][latent] for latent in range(LATENTS)]
        assert latents.meta.counts[f"tokens_{kind}"] == totals[kind] > 0


def test_examples_say_what_each_position_holds(folder: Path) -> None:
    latents, store = Latents.open(folder / "latents"), Store.open(folder / "store")
    for one in [example for latent in range(6) for example in [*latents.top(latent), *latents.silent(latent)]]:
        span = slice(one.start, one.start + len(one.tokens))
        assert one.kind.tolist() == store.pictures.kind([one.context])[0][span].tolist()
        assert one.image.tolist() == store.pictures.image([one.context])[0][span].tolist()
        assert one.cell.tolist() == store.pictures.cell([one.context])[0][span].tolist()


def test_thumbnails_are_kept_once(folder: Path) -> None:
    from PIL import Image

    latents = Latents.open(folder / "latents")
    names = {one.thumbnail for latent in range(LATENTS) for one in latents.pictures(latent)}
    assert {path.name for path in (folder / "latents/thumbnails").iterdir()} == names
    assert len(names) == len({bytes_of(context) for context in range(20)}) == 3
    one = latents.pictures(0)[0]
    assert Image.open(io.BytesIO(latents.thumbnail(one.thumbnail))).size == (30, 20)


def test_any_order_of_parts_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "PART_TOKENS", 200)
        patch.setattr(batches, "BATCH_TOKENS", 64)
        patch.setattr("stage_inspect.inspect.missing_parts", backwards)
        inspect(inspect_config(folder, **{"latents.top": TOP, "latents.url": tmp_path / "latents"}))
    assert content(tmp_path / "latents") == content(folder / "latents")


def backwards(*given: object) -> list[int]:
    from stage_inspect.scan.scan import missing_parts

    return missing_parts(*given)[::-1]  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [*sorted(layout.PICTURED), "thumbnails"])
def test_a_flipped_bit_is_found(folder: Path, tmp_path: Path, path: str) -> None:
    shutil.copytree(folder / "latents", tmp_path / "latents")
    files = [one for one in (tmp_path / "latents" / path).rglob("*") if one.is_file() and one.name != "zarr.json"]
    data = bytearray(files[0].read_bytes())
    data[25] ^= 4
    files[0].write_bytes(data)
    latents = Latents.open(tmp_path / "latents")
    with pytest.raises(GranaryError, match="damaged"):
        read_all(latents)


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("pictures/size", [1 << 20, 1 << 20]), ("pictures/size", [0, 5]), ("pictures/grids", 1 << 40),
        ("grids/shape", [0, 3]), ("grids/shape", [1, 1]), ("grids/place", [0, 0, 0, 1]),
        ("grids/place", [np.nan, 0, 1, 1]), ("grids/place", [0, 0, 1e300, 1]), ("regions/cell", [-1, 0]),
        ("regions/cell", [0, 9]), ("regions/grid", 4_000_000), ("seen/picture", 4_000_000), ("seen/regions", 0),
        ("seen/offsets", 1 << 60), ("seen/region_offsets", 3), ("pictures/thumbnail", [7] * 32),
    ],
)  # fmt: skip
def test_what_a_stranger_changed_is_refused(folder: Path, tmp_path: Path, path: str, row: object) -> None:
    """Whole arrays with right checksums that say what no writer says."""
    from shared.latents.arrays import ArrayWriter
    from shared.store.io.open import open_io

    latents = Latents.open(shutil.copytree(folder / "latents", tmp_path / "latents"))
    rows = latents.array(path).all()
    rows[1 if path.endswith("offsets") else slice(None)] = row
    shutil.rmtree(tmp_path / "latents" / path)
    spec = layout.ARRAYS[path]
    writer = ArrayWriter(open_io(tmp_path / "latents"), path, spec, spec.row_shape(latents.meta.axes))
    writer.append(rows)
    writer.close()
    latents = Latents.open(tmp_path / "latents")
    with pytest.raises(GranaryError, match="damaged"):
        read_all(latents)


@pytest.mark.parametrize("digest", ["../meta.json", "a" * 63, "A" * 64, "", "/etc/passwd", "0" * 64])
def test_a_thumbnail_is_no_path(folder: Path, digest: str) -> None:
    with pytest.raises(GranaryError, match="damaged"):
        Latents.open(folder / "latents").thumbnail(digest)


def test_a_folder_without_pictures_says_so(folder: Path, tmp_path: Path) -> None:
    """One of an earlier version, of the same store: made again, not taken for finished."""
    shutil.copytree(folder / "latents", tmp_path / "latents")
    meta = json.loads((tmp_path / "latents/meta.json").read_text())
    meta["settings"]["identity"] = "0" * 64
    (tmp_path / "latents/meta.json").write_text(json.dumps(meta))
    config = inspect_config(folder, **{"latents.top": TOP, "latents.url": tmp_path / "latents"})
    with pytest.raises(GranaryError, match="overwrite"):
        inspect(config)
