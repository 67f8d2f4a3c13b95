"""What pages say of images: the folder's own words, the same image once, and nothing beyond thumbnails and hashes."""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shared.basics.errors import GranaryError
from shared.basics.images import is_thumbnail
from shared.latents import Latents
from stage_inspect.explorer import publish
from stage_inspect.explorer.__main__ import looking_at
from stage_inspect.explorer.documents import REGION, Documents
from stage_inspect.explorer.server import Run
from stage_inspect.regions.looking import Looking
from tests.exploring import Client, serving
from tests.latents import synthetic_latents
from tests.pictured_run import pictured_run

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return Documents(Latents.open(pictured_run(tmp_path_factory.mktemp("pages")) / "latents"), "made up")


@pytest.fixture(scope="module")
def client(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The run with images, and one of text."""
    text = Documents(synthetic_latents(tmp_path_factory.mktemp("text") / "latents"), "text")
    with serving([Run(documents, None, looking=Looking.open(documents.latents.url)), Run(text, None)]) as client:
        yield client


def test_a_page_shows_each_image_once(documents: Documents) -> None:
    latents = documents.latents
    for index in range(6):
        page, pictures = documents.latent(index)["pictures"], latents.pictures(index)
        best = {one.sha256: one for one in reversed(pictures)}
        assert {one["sha256"]: one["value"] for one in page["shown"]} == pytest.approx(
            {name: one.value for name, one in best.items()}, rel=1e-5
        )
        assert sum(1 + one["others"] for one in page["shown"]) == len(pictures)
        for shown in page["shown"]:
            one = best[shown["sha256"]]
            assert shown["cells"] == [[grid, *cell] for grid, cell in zip(one.grid, one.cell.tolist(), strict=True)]
            assert shown["a"] == pytest.approx(one.values.tolist(), rel=1e-3)
            assert shown["grids"] == [[2, 3, 0.0, 0.0, 10.0, 10.0]] * len(one.grids)
        numbers = latents.latent(index).numbers
        assert page["kinds"] == [[k, numbers[f"fired_{k}"], latents.meta.counts[f"tokens_{k}"]] for k in
                                 ("image", "text", "assistant")]  # fmt: skip


def test_regions_in_a_text_are_signs(documents: Documents) -> None:
    one = documents.latents.top(0)[0]
    pieces = documents.example(one)["pieces"]
    assert [piece == REGION for piece in pieces] == [kind & 7 == 3 for kind in one.kind.tolist()]


def test_a_folder_of_text_has_no_pictures(client: Client) -> None:
    assert client.get("/with/1/data/latent/1.json").json()["pictures"] is None
    assert client.get("/with/1/data/meta.json").json()["box"] is None
    assert client.get("/with/1/api/images/0").status == 400
    assert client.post("/with/1/api/box", {"context": 0, "number": 0, "box": [0, 0, 1, 1]}).status == 400


def test_thumbnails_are_served_by_their_hash_alone(client: Client, documents: Documents) -> None:
    digest = documents.latents.pictures(0)[0].thumbnail
    answer = client.get(f"/data/picture/{digest}.webp")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/webp")
    assert is_thumbnail(answer.content)
    for name in ("0" * 64, "..%2fmeta.json", digest.upper(), digest[:63]):
        assert client.get(f"/data/picture/{name}.webp").status in (400, 404)


def test_a_box_is_answered(client: Client, documents: Documents) -> None:
    assert client.get("/data/meta.json").json()["box"] == {"contexts": 20}
    (image,) = client.get("/api/images/4").json()["images"]
    assert (image["width"], image["height"], image["number"]) == (30, 20, 0)
    assert is_thumbnail(base64.b64decode(image["address"].removeprefix("data:image/webp;base64,")))
    found = client.post("/api/box", {"context": 4, "number": 0, "box": [0, 0, 15, 10]}).json()
    wanted = Looking.open(documents.latents.url).box(4, 0, (0, 0, 15, 10)).latents
    assert {one["latent"]: one["share"] for one in found["latents"]} == pytest.approx(
        {one.latent: one.share for one in wanted}, rel=1e-3
    )


def test_a_store_that_is_not_there_leaves_the_page_out(
    documents: Documents, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert looking_at(documents, None, None) is not None
    latents = documents.latents
    moved = replace(latents.meta, store={**latents.meta.store, "url": str(tmp_path / "gone")})
    assert looking_at(Documents(Latents(latents.io, moved), "moved"), None, None) is None
    assert "without the page of the store's images" in capsys.readouterr().out
    assert looking_at(Documents(Latents(latents.io, moved), "moved"), None, latents.meta.store["url"]) is not None
    with pytest.raises(GranaryError):
        looking_at(documents, None, str(tmp_path / "gone"))


@pytest.mark.parametrize(
    "body",
    [
        {}, {"context": 4, "number": 0}, {"context": 4, "number": 0, "box": [0, 0, 1]},
        {"context": 20, "number": 0, "box": [0, 0, 1, 1]}, {"context": 4, "number": 9, "box": [0, 0, 1, 1]},
        {"context": 4, "number": 0, "box": [0, 0, "1", 1]}, {"context": 4, "number": 0, "box": [0, 0, True, 1]},
        {"context": 4, "number": 0, "box": [5, 5, 5, 9]}, {"context": 4, "number": 0, "box": [40, 0, 50, 9]},
    ],
)  # fmt: skip
def test_a_box_that_is_none_is_one_line(client: Client, body: dict[str, object]) -> None:
    answer = client.post("/api/box", body)
    assert answer.status == 400
    assert answer.json()["error"]


def test_one_file_and_its_twin_hold_the_pictures(documents: Documents, tmp_path: Path) -> None:
    publish.write_page(documents, [0, 5], tmp_path / "page.html")
    publish.write_json(documents, [5, 0], tmp_path / "page.json")
    text, twin = (tmp_path / "page.html").read_text(), json.loads((tmp_path / "page.json").read_text())
    found = re.search(r'id="granary-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    table = json.loads(found[1])
    pages = {str(index): documents.latent(index) for index in (0, 5)}
    assert twin["latents"] == json.loads(json.dumps(pages))
    assert twin["meta"]["title"] == "made up"
    digests = {one["thumbnail"] for page in pages.values() for one in page["pictures"]["shown"]}
    assert set(twin["pictures"]) == digests
    assert {name for name in table if name.startswith("picture/")} == {f"picture/{digest}.webp" for digest in digests}
    for digest in digests:
        data = documents.latents.thumbnail(digest)
        assert base64.b64decode(table[f"picture/{digest}.webp"]) == data
        assert twin["pictures"][digest] == f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    assert json.loads(gzip.decompress(base64.b64decode(table["latents/5.json.gz"])))["5"] == twin["latents"]["5"]
    assert "http://" not in re.sub(r"http://www\.w3\.org/2000/svg", "", text)
    assert "https://" not in text


def test_a_folder_for_a_host_holds_them_too(documents: Documents, tmp_path: Path) -> None:
    publish.write_folder(documents, tmp_path / "site")
    written = {path.stem: path.read_bytes() for path in (tmp_path / "site/data/picture").iterdir()}
    assert written
    assert all(documents.latents.thumbnail(digest) == data for digest, data in written.items())
