"""A search for a concept that is started from the page: its progress, its result, and its end whatever it is doing."""

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.latents import Latents
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.limits import CONCEPT_CHARACTERS, CONCEPTS
from stage_inspect.explorer.searching import Place, Searching
from stage_inspect.explorer.server import Run
from tests.exploring import Client, serving

PATIENCE = 120  # seconds: the machine may be busy
ENDLESS = r"((?:.|\n)+)+\x00"  # tries every way to divide a document


@pytest.fixture(scope="module")
def client(study: Path) -> Iterator[Client]:
    latents = Latents.open(study / "latents")
    place = Place(latents.url)
    with serving(
        [Run(Documents(latents, "planted"), None, searching=Searching(place)), Run(Documents(latents, "other"), None)]
    ) as client:
        yield client


def waited(client: Client, state: str) -> dict[str, Any]:
    """The progress once it is in this state."""
    limit = time.monotonic() + PATIENCE
    while True:
        progress: dict[str, Any] = client.get("/api/find").json()
        if progress["state"] == state:
            return progress
        assert progress["state"] in ("running", state), progress
        assert time.monotonic() < limit, progress
        time.sleep(0.05)


def test_a_search_ends_on_the_page_of_concepts(client: Client, study: Path) -> None:
    assert client.get("/data/meta.json").json()["find"]["splits"] == ["heldout", "train", "all"]
    asked = {
        "python": ["number"],
        "regex": ["self", "nowhere to be seen"],
        "token": ["#"],
        "split": "all",
        "contexts": 46,
    }
    assert client.post("/api/find", asked).json()["state"] == "running"
    done = waited(client, "done")
    assert done["concepts"] == ["number", "/self/", "token #"]
    assert "no token of the half" in done["left_out"]["/nowhere to be seen/"]
    assert done["tokens"] == done["total"] == 46 * 96
    shown = {one["name"]: one["latents"][0][0] for one in client.get("/data/concepts.json").json()}
    assert {name: shown[name] for name in done["concepts"]} == {"number": 3, "/self/": 4, "token #": 5}


def test_a_match_without_end_is_cancelled(client: Client) -> None:
    """What hangs is killed; until then nobody else may start, and then anybody."""
    before = children()
    assert client.post("/api/find", {"regex": [ENDLESS], "split": "all"}).status == 200
    limit = time.monotonic() + PATIENCE
    while client.get("/api/find").json()["total"] is None:  # it is still opening
        assert time.monotonic() < limit
        time.sleep(0.05)
    second = client.post("/api/find", {"regex": ["self"]})
    assert (second.status, second.json()) == (400, {"error": "a search is running: wait for its end, or cancel it"})
    assert client.get("/api/find").json()["state"] == "running"
    assert client.post("/api/find/cancel", {}).json()["state"] == "cancelled"
    assert not children() - before
    assert client.post("/api/find", {"regex": ["self"]}).json()["state"] == "running"
    assert client.post("/api/find/cancel", {}).json()["state"] == "cancelled"


@pytest.mark.slow
def test_what_the_command_refuses_is_told(client: Client) -> None:
    assert client.post("/api/find", {"regex": ["("]}).json()["state"] == "running"
    assert "'(' is no regular expression: missing )" in waited(client, "failed")["error"]


@pytest.mark.slow  # what ends it is what cancels it above; tests/pipeline/test_explore.py ends the command
def test_the_search_ends_with_the_server(study: Path) -> None:
    latents = Latents.open(study / "latents")
    before = children()
    with serving([Run(Documents(latents, "planted"), None, searching=Searching(Place(latents.url)))]) as client:
        client.post("/api/find", {"regex": [ENDLESS]})
        started = children() - before
        assert len(started) == 1
    assert not children() & started


def children() -> set[int | None]:
    """Ids of the processes that this one has spawned and that are alive."""
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"regex": ["x" * (CONCEPT_CHARACTERS + 1)]}, "at most 400 characters"),
        ({"regex": ["x"] * (CONCEPTS + 1)}, "at most 20 texts"),
        ({"regex": ["x"] * CONCEPTS, "token": ["x"]}, "20 concepts at a time"),
        ({"regex": "x"}, "list"),
        ({"token": [3]}, "text"),
        ({"python": ["all"], "split": "some"}, "split"),
        ({"python": ["all"], "contexts": -1}, "whole number"),
    ],
)
def test_what_is_too_long_starts_nothing(client: Client, body: Any, told: str) -> None:
    before = client.get("/api/find").json()
    answer = client.post("/api/find", body)
    assert answer.status == 400
    assert told in answer.json()["error"]
    assert client.get("/api/find").json() == before


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Content-Type": "text/plain"}]
)
def test_a_page_of_another_site_starts_and_ends_nothing(client: Client, headers: dict[str, str]) -> None:
    before = client.get("/api/find").json()
    for path in ("/api/find", "/api/find/cancel"):
        assert client.post(path, {"regex": ["self"]}, **headers).status == 403
    assert client.get("/api/find").json() == before
    assert client.get("/api/find", Host="evil.example").status == 403


def test_where_nobody_may_search_it_is_said(client: Client) -> None:
    assert client.get("/with/1/data/meta.json").json()["find"] is None
    answer = client.post("/with/1/api/find", {"regex": ["self"]})
    assert answer.status == 400
    assert "granary inspect find" in answer.json()["error"]
