"""Names of sites: what is refused, where the rest lie, and that a store of any accepted names is whole."""

import tempfile
from pathlib import Path

import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.basics.errors import GranaryError
from shared.store import Store
from shared.store.format import layout
from shared.store.format.layout import StorePlan
from shared.store.format.site_path import MAX_LENGTH, check_sites, scale_path, site_path
from shared.store.verify import drop_incomplete, verify
from tests.examples import examples
from tests.synthetic import synthetic_context, synthetic_plan, synthetic_store

PARTS = st.text("abcXYZ019_-", min_size=1, max_size=12)
NAMES = st.lists(PARTS, min_size=1, max_size=5).flatmap(
    lambda parts: st.lists(st.sampled_from("./"), min_size=len(parts) - 1, max_size=len(parts) - 1).map(
        lambda marks: "".join(part + mark for part, mark in zip(parts, [*marks, ""], strict=True))
    )
)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layers.2.resid_post", "layers/2/resid_post"),
        ("vision_tower/blocks.11/mlp-out", "vision_tower/blocks/11/mlp-out"),
        ("encoder", "encoder"),
        ("model.tokens", "model/tokens"),
        ("cc.conv", "cc/conv"),
        ("x" * MAX_LENGTH, "x" * MAX_LENGTH),
    ],
)
def test_a_name_is_a_path(name, path):
    assert site_path(name) == path
    assert scale_path(name) == f"{path}_scale"
    assert layout.statistics_path(name) == f"statistics/{path}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "letters, digits"),
        ("layers 2", "letters, digits"),
        ("layers.2.resid\n", "letters, digits"),
        ("schicht.größe", "letters, digits"),
        ("a\\b", "letters, digits"),
        ("a.b.", "part of it is empty"),
        ("/etc/passwd", "part of it is empty"),
        ("..", "part of it is empty"),
        ("a/../b", "part of it is empty"),
        ("./a", "part of it is empty"),
        ("x" * (MAX_LENGTH + 1), "201 characters"),
        ("tokens", "tokens is what the store"),
        ("mask.x", "mask is what the store"),
        ("Segments", "Segments is what the store"),
        ("manifest/00000000.json", "manifest is what the store"),
        ("extents.a", "extents is what the store"),
        ("statistics/layers/2/resid_post", "statistics is what the store"),
        ("window.plan", "window is what the store"),
        ("zarr.json", "zarr is what the store"),
        ("_COMPLETE.json", "_COMPLETE is what the store"),
        ("image", "image is what the store"),
        ("layers.2.c.0.0.0", "where Zarr keeps the chunks"),
        ("C", "where Zarr keeps the chunks"),
        ("layers.__call__", "begin with __"),
    ],
)
def test_a_name_that_can_not_be_is_one_clear_line(name, reason):
    with pytest.raises(GranaryError, match=reason) as caught:
        synthetic_plan(hooks={name: 8})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("names", "scaled", "reason"),
    [
        (["a.b", "a/b"], False, "site a.b and site a/b have the same path"),
        (["a.B", "a.b"], False, "have the same path"),
        (["a.b", "a"], False, "site a and site a.b lie one inside the other"),
        (["a.b.c1.d", "x", "a.b"], False, "site a.b and site a.b.c1.d lie one inside the other"),
        (["a.b", "a.b_scale"], True, "have the same path"),
        (["a.b", "a.b_scale.w"], True, "the scales of site a.b and site a.b_scale.w lie one inside the other"),
    ],
)
def test_two_sites_that_would_meet_are_one_clear_line(names, scaled, reason):
    with pytest.raises(GranaryError, match=reason) as caught:
        synthetic_plan(hooks=dict.fromkeys(names, 8), dtype="int8" if scaled else "bfloat16")
    assert "\n" not in str(caught.value)


def test_sites_that_only_look_alike_are_accepted():
    check_sites(["a.b", "a.bc", "a.b_scale", "a.b-x.c1", "ab"], scaled=False)


@settings(max_examples=examples(8), suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True), dtype=st.sampled_from(["float32", "int8"]))
def test_a_store_of_any_accepted_names_is_written_read_and_verified(names: list[str], dtype: str) -> None:
    try:
        plan = synthetic_plan(num_contexts=3, seq_len=4, shard_contexts=2, hooks=dict.fromkeys(names, 5), dtype=dtype)
    except GranaryError:
        return  # what is refused, and why, is above
    with tempfile.TemporaryDirectory() as folder:
        synthetic_store(folder, plan)
        store = Store.open(folder)
        assert StorePlan.from_json(store.plan.to_json()).hash() == plan.hash()
        group = zarr.open_group(folder, mode="r")
        for site in names:
            for context in range(3):
                wanted = synthetic_context(store.plan, site, context)
                read = store.read_context(site, context)
                if dtype == "float32":
                    assert torch.equal(read, wanted)
                    assert torch.equal(torch.from_numpy(group[site_path(site)][context]), wanted)
                else:
                    torch.testing.assert_close(read.float(), wanted, rtol=0.02, atol=wanted.abs().max().item() / 100)
        report = verify(folder)
        assert report.intact
        assert not report.foreign + report.uncommitted + report.leftovers
        outside = {path.name for path in Path(folder).iterdir()}
        assert outside <= {site_path(name).split("/")[0] + end for name in names for end in ("", "_scale")} | {
            "tokens", "mask", "segments", "statistics", "manifest", "extents", "zarr.json", "_COMPLETE.json",
        }  # fmt: skip


def test_uncommitted_objects_are_those_of_the_plan_s_arrays_alone(tmp_path):
    plan = synthetic_plan(hooks={"vision.blocks.3": 8}, dtype="int8")
    synthetic_store(tmp_path, plan, finalize=False)
    (tmp_path / layout.manifest_key(1)).unlink()
    mine = tmp_path / "mine" / "c" / "1" / "0" / "0"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"of somebody else")
    lost = [layout.object_key(path, 1, 3) for path in sorted(layout.shard_arrays(plan))]
    assert len(lost) == 3
    assert [layout.shard_of_key(key, layout.shard_arrays(plan)) for key in lost] == [1, 1, 1]
    report = verify(str(tmp_path))
    assert report.uncommitted == sorted(lost)
    assert report.foreign == ["mine/c/1/0/0"]
    assert sorted(drop_incomplete(str(tmp_path))) == sorted(lost)
    assert mine.exists()
