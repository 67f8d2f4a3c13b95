"""The explorer's server: who is answered, what is answered, and that no request reaches beyond its table of files."""

import gzip
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from shared.latents import Latents
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.guard import HEADERS
from stage_inspect.explorer.limits import BODY_BYTES, NOTE_CHARACTERS
from stage_inspect.explorer.server import Run, static_files
from tests.exploring import Client, serving
from tests.latents import synthetic_latents


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return synthetic_latents(tmp_path_factory.mktemp("explorer") / "latents", 130)


@pytest.fixture(scope="module")
def client(latents: Latents) -> Iterator[Client]:
    with serving(
        [Run(Documents(latents, title), None, "there is no model") for title in ("first", "second")]
    ) as client:
        yield client


def test_documents_are_served(client: Client, latents: Latents) -> None:
    meta = client.get("/data/meta.json").json()
    assert (meta["title"], meta["d_latent"], meta["live"], meta["writable"]) == ("first", 130, None, True)
    assert meta["siblings"] == [{"number": 1, "title": "second"}]
    assert client.get("/with/1/data/meta.json").json()["title"] == "second"
    density = np.frombuffer(client.get("/data/column/density.f4").content, "<f4")
    assert np.array_equal(density, latents.table["density"].astype(np.float32))
    fired = np.frombuffer(client.get("/data/column/fired.u4").content, "<u4")
    assert np.array_equal(fired, latents.table["fired"])
    assert client.get("/data/latent/5.json").json() == json.loads(json.dumps(Documents(latents, "").latent(5)))
    assert set(client.get("/data/rows/2.json").json()) == {"128", "129"}
    assert client.get("/data/concepts.json").json() == []


def test_every_answer_carries_the_policy(client: Client) -> None:
    for path in ("/", "/static/app.js", "/data/meta.json", "/nowhere", "/data/latent/500.json", "/data/rows/9.json"):
        headers = client.get(path).headers
        assert {name: headers.get(name) for name in HEADERS} == HEADERS, path
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:{port}.evil.example", "", "[::1]"]
)
def test_another_host_is_refused(client: Client, host: str) -> None:
    answer = client.get("/data/meta.json", Host=host.format(port=client.port))
    assert answer.status == 403
    assert b"title" not in answer.content


def test_a_name_of_this_machine_is_answered(client: Client) -> None:
    assert client.get("/", Host=f"localhost:{client.port}").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_a_page_of_another_site_changes_nothing(client: Client, latents: Latents, headers: dict[str, str]) -> None:
    assert client.post("/api/note/4", {"text": "planted"}, **headers).status == 403
    assert latents.notes.note(4) == ""


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/static/index.html",
        "/static/app.js/",
        "/static/app.js%00",
        "/data/latent/../meta.json%2f..",
        "/data/latent/-1.json",
        "/data/latent/1e3.json",
        "/data/column/..%2f..%2fmeta.json",
        "/with/2/data/meta.json",
    ],
)
def test_there_are_no_other_files(client: Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status in (400, 404)
    assert "error" in answer.json()


def test_notes_and_lists_are_kept(client: Client, latents: Latents) -> None:
    assert client.post("/api/note/7", {"text": " quotes \n the second line"}).status == 200
    assert latents.notes.note(7) == "quotes \n the second line"
    assert client.get("/data/rows/0.json").json()["7"][0] == "quotes "
    assert client.get("/api/search?q=second%20line").json()["latents"][0] == 7
    for latent, on in ((3, True), (9, True), (3, False), (9, True)):
        lists = client.post("/api/lists", {"list": "mine", "latent": latent, "on": on}).json()["lists"]
    assert lists == {"mine": [9]}
    assert client.post("/api/lists", {"list": "mine", "latent": 9, "on": False}).json()["lists"] == {}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/note/7", {"text": "x" * (NOTE_CHARACTERS + 1)}),
        ("/api/note/7", {"text": 3}),
        ("/api/note/130", {"text": "past the end"}),
        ("/api/note/7", ["text"]),
        ("/api/lists", {"list": "", "latent": 3, "on": True}),
        ("/api/lists", {"list": "a", "latent": 130, "on": True}),
        ("/api/lists", {"list": "a", "latent": True, "on": True}),
        ("/api/lists", {"list": "a", "latent": 3, "on": "yes"}),
        ("/api/text", {"text": "the model reads"}),
        ("/api/note/7", {"text": "x" * BODY_BYTES}),
    ],
)
def test_a_wrong_request_is_one_sentence(client: Client, path: str, body: Any) -> None:
    answer = client.post(path, body)
    assert answer.status == 400
    assert set(answer.json()) == {"error"}


def test_search_finds_names_and_tokens(client: Client, latents: Latents) -> None:
    latents.notes.add_explanation(21, "names of gardens", method="rule", author="nobody")
    assert client.get("/api/search?q=gardens").json() == {"latents": [21], "total": 1}
    word = client.get("/api/search?q=word7").json()["latents"]
    assert word == [found.latent for found in latents.find(token="word7", limit=1000)]
    assert client.get("/api/search?q=" + quote('"unfinished AND (')).json()["latents"] == []
    assert client.get("/api/search").json()["latents"] == []


def test_pages_are_small(client: Client) -> None:
    assert client.get("/data/latent/5.json").transferred < 100_000
    assert sum(len(gzip.compress(content)) for content in static_files().values()) < 60_000


def test_a_person_changes_what_they_wrote_and_nothing_else(client: Client, latents: Latents) -> None:
    rule = latents.notes.add_explanation(12, "token is 'a'", method="rule", author="granary")
    latents.notes.add_score(rule, "rule_f1", 0.75)
    assert client.post("/api/said/12", {"id": rule, "text": "the letter a"}).status == 200
    kept, own = latents.notes.explanations(12)
    assert (kept.id, kept.text, own.text, own.method) == (rule, "token is 'a'", "the letter a", "person")
    assert len(latents.notes.scores(rule)) == 1
    assert client.post("/api/said/12", {"id": own.id, "text": "a, alone"}).status == 200
    assert [one.text for one in latents.notes.explanations(12)] == ["token is 'a'", "a, alone"]
    assert client.post("/api/said/12", {"id": latents.notes.explanations(12)[1].id, "text": " "}).status == 200
    assert client.post("/api/said/12", {"id": [rule], "text": ""}).status == 400
    assert [one.id for one in latents.notes.explanations(12)] == [rule]
    assert client.post("/api/said/130", {"text": "x"}).status == 400
