"""Images to a scored SAE: the store of rows with images against the whole model, its faults, and kinds of tokens."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from shared.basics.images import EncodedImage
from shared.lm import capture
from shared.lm.hookpoint import HookPoint
from shared.lm.vision.reader import VisionReader
from shared.store import Store
from shared.store.verify import drop_incomplete, verify
from tests.cli import ForkServer
from tests.picture_models import FAMILIES

pytest.importorskip("PIL")
from tests import picture_corpus
from tests.picture_harvests import SITES, TIMES, Pictures

QUICK = "llava_next"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(
    scope="module", params=[QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES if one != QUICK)]
)
def pictures(request: pytest.FixtureRequest, stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    root = tmp_path_factory.mktemp("pictures")
    made = Pictures(request.param, root, stages.at(root))
    made.harvest()
    return made


def test_the_store_holds_the_activations_of_the_whole_model(pictures: Pictures) -> None:
    store, reader = Store.open(pictures.root / "store"), VisionReader.load(str(pictures.model))
    rows = picture_corpus.rows()
    assert store.num_contexts == TIMES * len(rows)
    points = {HookPoint.parse(site): site for site in SITES}
    for context in range(len(rows) + 1):  # of one shard and of the next
        length = int((store.segments([context])[0] >= 0).sum())
        ids_L = torch.from_numpy(store.tokens([context])[0, :length].astype(np.int64))
        numbers = rows[context % len(rows)][1]
        images = [EncodedImage(picture_corpus.picture(number), "here") for number in numbers]
        with torch.no_grad(), capture(pictures.whole, list(points)) as captured:
            pictures.whole(**reader.inputs(ids_L, [image.decode() for image in images]))
        for point, site in points.items():
            found = store.read_context(site, context)
            assert torch.equal(found[:length], captured[point][0])
            assert not found[length:].any()
        named = [row.sha256 for row in store.pictures.rows_of(context) if row.grid == 0]
        assert named == [image.sha256 for image in images]
        assert [store.pictures.data(one) for one in named] == [image.data for image in images]
    array = zarr.open_group(pictures.root / "store", mode="r")["cell"]
    assert np.array_equal(np.asarray(array[0]), store.pictures.cell([0])[0])
    assert verify(str(pictures.root / "store")).intact
    files = list((pictures.root / "store" / "images" / "files").iterdir())
    assert sorted(file.name for file in files) == sorted(
        {hashlib.sha256(picture_corpus.picture(n)).hexdigest() for _, shown in rows for n in shown}
    )


@pytest.mark.slow
def test_an_image_that_is_damaged_or_gone_is_found_and_mended(pictures: Pictures) -> None:
    store = pictures.harvest("mended", corpus__contexts=12)
    digest = store.digest()
    file = next(iter((pictures.root / "mended" / "images" / "files").iterdir()))
    data = file.read_bytes()
    table = pictures.root / "mended" / "images" / "table" / "00000001.jsonl"
    for target, change, told in (
        (file, lambda: file.write_bytes(data[:-1] + b"x"), "fails its checksum"),
        (file, file.unlink, "is missing"),
        (table, lambda: table.write_bytes(table.read_bytes().replace(b'"width":', b'"wodth":')), "fails its checksum"),
    ):
        change()
        report = verify(str(pictures.root / "mended"))
        key = str(target.relative_to(pictures.root / "mended"))
        assert (key, told) in [(one.key, one.what) for one in report.problems]
        drop_incomplete(str(pictures.root / "mended"), report)
        assert pictures.harvest("mended", corpus__contexts=12).digest() == digest
        report = verify(str(pictures.root / "mended"))
        assert report.intact
        assert not report.foreign
    assert file.read_bytes() == data


@pytest.mark.slow
def test_train_and_score_one_kind_of_token(pictures: Pictures) -> None:
    run = pictures.root / "run"
    scores: dict[str, Any] = {}
    for kinds in ("null", "[image]", "[assistant]"):
        name = kinds.strip("[]")
        arguments = [f"run_dir={run}", f"store.url={pictures.root}/store", "hook=layers.2.resid_pre", "sae.k=4"]
        arguments += ["sae.expansion=2", "schedule.tokens=4096", "stream.batch_size=64", f"stream.kinds={kinds}",
                      "stream.lanes=4", f"out_dir={run}/{name}", "device.threads=1"]  # fmt: skip
        result = pictures.server.run("stage_train", *arguments)
        assert result.code == 0, result.stderr
        arguments = [f"run_dir={run}", f"sae.path={run}/{name}", f"store.url={pictures.root}/store", "downstream=false"]
        result = pictures.server.run("stage_eval", *arguments, f"kinds={kinds}", f"out_dir={run}/{name}/eval")
        assert result.code == 0, result.stderr
        scores[name] = json.loads((run / name / "eval" / "eval.json").read_text())
    store = Store.open(pictures.root / "store")
    held = store.contexts("heldout")
    mask = store.mask(held)
    for name, kinds in (("null", ["text", "image", "assistant"]), ("image", ["image"]), ("assistant", ["assistant"])):
        found = scores[name]["breakdown"]["kind"]
        expected = {kind: int((mask & store.pictures.chosen(held, [kind])).sum()) for kind in kinds}
        assert {kind: found[kind]["tokens"] for kind in kinds} == expected
    whole, image = scores["null"]["breakdown"]["kind"], scores["image"]
    assert whole["text"]["tokens"] + whole["image"]["tokens"] == scores["null"]["n_tokens"]
    assert image["n_tokens"] == image["breakdown"]["kind"]["image"]["tokens"]
    assert image["fvu"] == pytest.approx(image["breakdown"]["kind"]["image"]["fvu"])
    assert "kind of token" in (run / "null" / "eval" / "report.html").read_text()
    x_ND = torch.cat([store.read_context("layers.2.resid_pre", int(c))[torch.from_numpy(m)] for c, m in
                      zip(held, mask & store.pictures.chosen(held, ["image"]), strict=True)])  # fmt: skip
    assert image["breakdown"]["kind"]["image"]["mean_norm"] == pytest.approx(float(x_ND.norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"packing": "isolated"}, "reads images beside text: its rows are run one by one, set packing=separate"),
        ({"packing__seq_len": 20}, "rows.parquet row 1 takes"),
        slow({"hooks__modules": "layers.0.mlp"}, "hooks.modules is for text decoders"),
        slow({"model__quantisation": "bnb_int8"}, "model.quantisation is for text decoders, use tensor_parallel"),
        slow({"model": "bundled"}, "is a llama: rows with images are known for llava"),
        slow(
            {"corpus__images": None, "chat__mark_assistant": "true"}, "chat.mark_assistant=true goes with corpus.images"
        ),
        slow({"corpus__images": "pictures"}, "has no column 'pictures'"),
    ],
)
def test_what_is_wrong_is_one_line(pictures: Pictures, changes: dict[str, object], told: str) -> None:
    if pictures.model.name != QUICK:
        pytest.skip("the same of every family")
    result = pictures.run("refused", **changes)
    assert result.code == 2
    assert told in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_store_with_images_is_not_taken_for_its_tokens(pictures: Pictures) -> None:
    if pictures.model.name != QUICK:
        pytest.skip("the same of every family")
    command = [f"corpus.path={pictures.root}/store", f"store.url={pictures.root}/other", f"model={pictures.model}"]
    result = pictures.server.run("stage_harvest", "corpus=store", *command, f"run_dir={pictures.root}/run")
    assert "its contexts hold images" in result.error
