"""Explanations by a model that reads images, on real HTTP: what it is shown, what is kept, what of it is wrong."""

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.basics.errors import GranaryError
from shared.latents.folder import Latents
from stage_inspect.explain import language_command
from stage_inspect.explain.endpoint import client
from stage_inspect.explain.pictures import choose_pictures, drawn, heat
from stage_inspect.explain.sides import Sides
from tests.distinct_pictures import distinct_run
from tests.endpoint import Body, Reply, Stub, stub
from tests.latents import synthetic_latents

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distinct_run(tmp_path_factory.mktemp("pictures")).parent


@pytest.fixture
def folder(run_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_folder / "latents", tmp_path / "latents")
    return tmp_path / "latents"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def latent(run_folder: Path) -> int:
    """One with pictures enough on both sides."""
    latents = Latents.open(run_folder / "latents")
    for index in range(len(latents.table["fired"])):
        chosen = choose_pictures(latents, index, Sides(None, 0), 8, 6)
        if chosen.why_not_explained is None and chosen.why_not_tested is None:
            return index
    raise AssertionError("no latent has pictures enough")


def run(folder: Path, latent: int, told: Stub) -> None:
    base = [str(folder), "--endpoint", told.url, "--model", "m", "--explainer", "pictures", "--retries", "1"]
    language_command.main([*base, "--latents", str(latent), "--test", "6"])


def parts_of(body: Body) -> list[Any]:
    return body["messages"][1]["content"]


def data_of(part: Any) -> bytes:
    return base64.b64decode(part["image_url"]["url"].partition(";base64,")[2])


def oracle(folder: Path, latent: int) -> Any:
    """Says "red", and of an image under "red" whether the latent fires on it; under all else, that it never does."""
    latents = Latents.open(folder)
    fires = {latents.thumbnail(one.thumbnail) for one in latents.pictures(latent)}

    def answer(_: Stub, __: str, body: Body) -> Reply:
        parts = parts_of(body)
        if "examples follow" in parts[0]["text"]:
            return "[EXPLANATION]: red"
        images = [data_of(part) for part in parts if part["type"] == "image_url"]
        return str([int(one in fires and parts[0]["text"] == "Pattern: red") for one in images])

    return answer


def test_a_latent_is_explained_and_tested_on_images_it_was_not_shown(folder: Path, latent: int) -> None:
    with stub(oracle(folder, latent)) as told:
        run(folder, latent, told)
    asked, *judged = told.asked
    latents = Latents.open(folder)
    (said,) = latents.notes.explanations(latent)
    assert (said.text, said.method, said.author) == ("red", "pictures", "m")
    assert said.details["apart"] == "image"
    shown = [part for part in parts_of(asked) if part["type"] == "image_url"]
    assert len(shown) == 3 * len(said.details["examples"])
    train = choose_pictures(latents, latent, Sides(None, 0), 8, 6).train
    for one, original, masked, overlaid in zip(train, shown[::3], shown[1::3], shown[2::3], strict=True):
        assert original["image_url"]["url"].startswith("data:image/webp;base64,UklGR")
        assert (data_of(masked), data_of(overlaid)) == drawn(data_of(original), one)
    tested = {data_of(part) for body in judged for part in parts_of(body) if part["type"] == "image_url"}
    assert tested
    assert not tested & {data_of(part) for part in shown}
    (score,) = latents.notes.scores(said.id)
    assert (score.scorer, score.value) == ("picture_detection", 1.0)
    assert score.details["controls"]["empty"]["value"] == 0.5
    assert score.details["counts"]["unread"] == 0


@pytest.mark.slow
def test_a_shuffled_explanation_is_the_baseline(folder: Path, latent: int) -> None:
    latents = Latents.open(folder)
    latents.notes.add_explanations([(latent + 1, "blue", "pictures", "m", {})])
    with stub(oracle(folder, latent)) as told:
        run(folder, latent, told)
    (said,) = latents.notes.explanations(latent)
    controls = latents.notes.scores(said.id)[0].details["controls"]
    assert (controls["shuffled"]["text"], controls["shuffled"]["value"]) == ("blue", 0.5)


@pytest.mark.slow
def test_nothing_is_asked_twice(folder: Path, latent: int) -> None:
    with stub(oracle(folder, latent)) as told:
        run(folder, latent, told)
        first = len(told.asked)
        run(folder, latent, told)
        assert len(told.asked) == first
    assert max(told.answered.values()) == 1


@pytest.mark.slow
def test_what_fails_is_told_and_asked_again(folder: Path, latent: int) -> None:
    """429 and garbage are unread, no zero; the next command asks again for what the endpoint failed in."""
    good = oracle(folder, latent)
    tries: list[str] = []

    def answer(told: Stub, path: str, body: Body) -> Reply:
        if "examples follow" in parts_of(body)[0]["text"]:
            return good(told, path, body)
        tries.append("x")
        replies: list[Reply] = [(429, {"Retry-After": "0"}, "slow down"), "no list", (200, {}, "<html>")]
        return replies[len(tries) % 3]

    latents = Latents.open(folder)
    with stub(answer) as told:
        run(folder, latent, told)
        (said,) = latents.notes.explanations(latent)
        (score,) = latents.notes.scores(said.id)
        assert score.details["unread"]
        told.answer = good
        run(folder, latent, told)
    last = latents.notes.scores(said.id)[-1]
    assert len(latents.notes.explanations(latent)) == 1
    reasons = {one["why"] for one in last.details["unread"]}
    assert reasons <= {"the answer is no list of as many numbers as there were examples"}  # that one is the model's


def test_heat_and_mask_against_a_loop(folder: Path, latent: int) -> None:
    latents = Latents.open(folder)
    picture = latents.pictures(latent)[0]
    wanted = np.zeros((20, 30), np.float32)
    for (left, top, right, bottom), value in zip(picture.boxes.tolist(), picture.values.tolist(), strict=True):
        for y in range(round(top), round(bottom)):
            for x in range(round(left), round(right)):
                wanted[y, x] = max(wanted[y, x], value / picture.value)
    assert np.array_equal(heat(picture, 30, 20), wanted)
    assert heat(picture, 60, 40)[::2, ::2].tolist() == wanted.tolist()
    data = latents.thumbnail(picture.thumbnail)
    before = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    masked, overlaid = (np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in drawn(data, picture))
    for y in range(20):
        for x in range(30):
            assert masked[y, x].tolist() == (before[y, x].tolist() if wanted[y, x] >= 0.5 else [127, 127, 127])
            red = [255, 0, 0]
            mixed = [
                own + 0.6 * wanted[y, x] * (end - own) for own, end in zip(before[y, x].tolist(), red, strict=True)
            ]
            assert np.abs(overlaid[y, x] - mixed).max() <= 0.51


def test_a_folder_without_pictures_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = synthetic_latents(tmp_path / "latents", 6)
    with pytest.raises(GranaryError, match="has no pictures: granary inspect a store with images"):
        choose_pictures(latents, 0, Sides(None, 0), 8, 6)
    with stub(lambda *_: "") as told, pytest.raises(SystemExit):
        language_command.main([latents.url, "--endpoint", told.url, "--model", "m", "--explainer", "pictures"])
    assert "has no pictures" in capsys.readouterr().err
    assert not told.asked
