"""The latents in a box, and the regions of a latent, against loops over single regions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.sae.loading import load
from shared.store import Store
from stage_inspect.regions import box as box_command
from stage_inspect.regions import rank
from stage_inspect.regions.looking import Looking, covered
from tests.pictured_run import LATENTS, pictured_run

pytest.importorskip("PIL")
CONTEXT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_run(tmp_path_factory.mktemp("regions"))


@pytest.fixture(scope="module")
def looking(folder: Path) -> Looking:
    return Looking.open(str(folder / "latents"))


@pytest.fixture(scope="module")
def slow(folder: Path) -> list[dict[str, Any]]:
    """Every region of the store, with what fires on it."""
    store, sae = Store.open(folder / "store"), load(folder / "sae")
    found = []
    for context in range(store.num_contexts):
        mask, segments = store.mask([context])[0], store.segments([context])[0]
        kind, cell = store.pictures.kind([context])[0], store.pictures.cell([context])[0]
        latents = sae.encode(store.read_context(store.hooks[0], context).float())
        for t in np.flatnonzero(mask & (segments >= 0) & (kind & 7 == 3)).tolist():
            fires = zip(latents.indices[t].tolist(), latents.values[t].tolist(), strict=True)
            row, col = cell[t].tolist()
            box = (10.0 * col, 10.0 * row, 10.0 * col + 10, 10.0 * row + 10)
            found.append({"context": context, "t": t, "cell": (row, col), "box": box,
                          "latents": {latent: value for latent, value in fires if latent >= 0}})  # fmt: skip
    return found


@pytest.mark.parametrize("latent", range(0, LATENTS, 5))
def test_regions_are_ranked(looking: Looking, slow: list[dict[str, Any]], latent: int) -> None:
    ranked = looking.regions(latent, count=7)
    hits = [(one["latents"][latent], one) for one in slow if latent in one["latents"]]
    wanted = sorted(hits, key=lambda hit: (-hit[0], hit[1]["context"], hit[1]["t"]))[:7]
    assert (ranked.seen, ranked.fired) == (len(slow), len(hits))
    assert [(one.context, one.position, (one.row, one.col), one.box) for one in ranked.regions] == [
        (one["context"], one["t"], one["cell"], one["box"]) for _, one in wanted
    ]
    assert [one.value for one in ranked.regions] == [np.float32(value) for value, _ in wanted]


@pytest.mark.parametrize("box", [(0, 0, 30, 20), (3, 4, 17, 16), (11, 2, 12, 3), (-50, -5, 10, 10.5)])
def test_a_box_weighs_each_region_by_what_it_covers(
    looking: Looking, slow: list[dict[str, Any]], box: tuple[float, ...]
) -> None:
    regions = [one for one in slow if one["context"] == CONTEXT]
    weights = []
    for one in regions:  # by counting points a tenth of a pixel apart
        left, top = one["box"][:2]
        points = [(left + (i + 0.5) / 10, top + (j + 0.5) / 10) for i in range(100) for j in range(100)]
        weights.append(sum(box[0] <= x < box[2] and box[1] <= y < box[3] for x, y in points) / 1e4)
    found = looking.box(CONTEXT, 0, box)
    assert found.regions == pytest.approx(sum(weights), abs=1e-6)
    assert found.regions_outside == pytest.approx(len(regions) - sum(weights), abs=1e-6)
    least = 0.5 if max(weights) >= 0.5 else 1e-9
    inside = [one for one, weight in zip(regions, weights, strict=True) if weight >= least]
    assert {one.latent for one in found.latents} == {latent for one in inside for latent in one["latents"]}
    for one in found.latents:
        values = np.array([region["latents"].get(one.latent, 0) for region in regions])
        weight = np.array(weights)
        assert one.inside == pytest.approx((weight * values).sum() / weight.sum(), rel=1e-5)
        assert one.outside == pytest.approx(((1 - weight) * values).sum() / max((1 - weight).sum(), 1e-12), abs=1e-5)
        assert one.share == pytest.approx((weight * values).sum() / values.sum(), rel=1e-5)
        assert one.strength == pytest.approx(values[weight >= least].max(), rel=1e-6)
    contrast = [one.inside - one.outside for one in found.latents]
    assert contrast == sorted(contrast, reverse=True)


def test_a_region_without_an_area_is_never_inside() -> None:
    boxes = np.array([[0, 0, 0, 10], [0, 0, 10, 10], [20, 20, 30, 30.0]])
    assert covered(boxes, (0, 0, 5, 10)).tolist() == [0, 0.5, 0]


@pytest.mark.parametrize(
    ("context", "number", "box", "told"),
    [
        (20, 0, (0, 0, 5, 5), "there is no context 20"), (-1, 0, (0, 0, 5, 5), "there is no context -1"),
        (3, 1, (0, 0, 5, 5), "there is no number 1"), (3, 0, (0, 0, 5), "is empty or none"),
        (3, 0, (5, 0, 5, 5), "is empty"),
        (3, 0, (0, 0, float("nan"), 5), "is empty"), (3, 0, (0, 0, float("inf"), 5), "is empty"),
        (3, 0, (31, 0, 40, 5), "meets no region of the image, 30 x 20 pixels"),
    ],
)  # fmt: skip
def test_a_box_that_is_none(looking: Looking, context: int, number: int, box: Any, told: str) -> None:
    with pytest.raises(GranaryError, match=told):
        looking.box(context, number, box)


def test_commands_write_json(
    folder: Path, looking: Looking, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank.main([str(folder), "5", "--count", "3", "--json", str(tmp_path / "regions.json")])
    ranked = json.loads((tmp_path / "regions.json").read_text())
    assert [one["value"] for one in ranked["regions"]] == [one.value for one in looking.regions(5, count=3).regions]
    assert "latent 5 fires on" in capsys.readouterr().out
    box_command.main([str(folder), "4", "--box", "0,0,15,10", "--json", str(tmp_path / "box.json")])
    boxed = json.loads((tmp_path / "box.json").read_text())
    assert [one["latent"] for one in boxed["latents"]] == [
        one.latent for one in looking.box(4, 0, (0, 0, 15, 10)).latents
    ]
    assert "latents fire on the" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        (rank, ["99"], "there is no latent 99"), (rank, ["5", "--count", "0"], "nothing to list"),
        (box_command, ["4", "--box", "1,2,3"], "give left,top,right,bottom"),
        (box_command, ["4", "--box", "1,2,x,4"], "give left,top,right,bottom"),
    ],
)  # fmt: skip
def test_a_wrong_question_is_one_line(
    folder: Path, command: Any, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([str(folder), *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_store_of_text_has_no_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stage_inspect.inspect import inspect
    from tests.inspection import inspect_config, small_sae, small_store

    small_store(tmp_path / "store", 6)
    small_sae(tmp_path / "sae")
    inspect(inspect_config(tmp_path))
    with pytest.raises(SystemExit):
        rank.main([str(tmp_path), "1"])
    assert "is of text alone: harvest one with corpus.images" in capsys.readouterr().err
