"""The client of language models: keeps every answer, asks again after failures, stays below ceilings, tells no key."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.basics.errors import GranaryError
from shared.latents.notes import Notes
from stage_inspect.explain.endpoint import client
from stage_inspect.explain.endpoint.budget import Budget, CeilingError, Ceilings
from stage_inspect.explain.endpoint.client import Asker, Endpoint, retry_after, wait_before
from stage_inspect.explain.endpoint.request import Failure, chat, text_of
from tests.endpoint import Reply, Stub, slowly, stub

KEY = "sk-hush-hush"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("GRANARY_API_KEY", raising=False)


def asking(told: Stub, folder: Path, ceilings: Ceilings | None = None, **fields: Any) -> Asker:
    given = {"concurrency": 4, "timeout": 5.0, "retries": 2, "variable": "GRANARY_API_KEY", **fields}
    endpoint = Endpoint.of(told.url, **given)
    return Asker(endpoint, Notes(folder / "notes.sqlite", writable=True), Budget(ceilings or Ceilings()))


def questions(told: Stub, count: int) -> list[Any]:
    return [chat(told.url, "m", "system", f"question {number}", max_tokens=5) for number in range(count)]


def failing(times: int, reply: Reply) -> Callable[[Stub, str, Any], Reply]:
    """Fails so many times for each question, then answers."""
    seen: dict[str, int] = {}

    def answer(_: Stub, __: str, body: Any) -> Reply:
        key = body["messages"][1]["content"]
        seen[key] = seen.get(key, 0) + 1
        return reply if seen[key] <= times else f"answer to {key}"

    return answer


def test_answers_are_kept_and_equal_requests_asked_once(tmp_path: Path) -> None:
    with stub(lambda _, __, body: "answer to " + body["messages"][1]["content"]) as told:
        for _ in range(2):
            with asking(told, tmp_path) as asker:
                found = asker.ask([*questions(told, 3), *questions(told, 3)])
            texts = [text_of(one) for one in found if isinstance(one, str)]
            assert texts == [f"answer to question {number}" for number in (0, 1, 2)] * 2
        assert len(told.asked) == 3
        assert asker.budget.reused == 3


@pytest.mark.parametrize(
    "reply",
    [(429, {"Retry-After": "0.01"}, ""), (500, {}, "oops"), (503, {}, ""), (200, {}, "<html>"), (200, {}, '{"a": 1}')],
)
def test_asks_again_after_a_failure(tmp_path: Path, reply: Reply) -> None:
    with stub(failing(2, reply)) as told, asking(told, tmp_path) as asker:
        assert all(isinstance(one, str) for one in asker.ask(questions(told, 3)))
        assert len(told.asked) == 9


def test_gives_up_and_says_why_without_keeping_anything(tmp_path: Path) -> None:
    with stub(lambda *_: (500, {}, "oops")) as told, asking(told, tmp_path) as asker:
        assert asker.ask(questions(told, 1)) == [Failure("HTTP 500, 3 times")]
        assert asker.notes.answer(questions(told, 1)[0].sha256) is None
        assert asker.budget.tokens == 0


def test_a_slow_endpoint_is_not_waited_for(tmp_path: Path) -> None:
    with stub(slowly(0.4, "late")) as told, asking(told, tmp_path, timeout=0.1, retries=0) as asker:
        assert asker.ask(questions(told, 1)) == [Failure("no answer within 0.1 s, 1 times")]


def test_no_more_side_by_side_than_was_said(tmp_path: Path) -> None:
    with stub(slowly(0.02, "x")) as told, asking(told, tmp_path, concurrency=3) as asker:
        asker.ask(questions(told, 12))
    assert 1 < told.most_at_once <= 3


def test_waits_double_with_jitter_and_the_server_is_obeyed() -> None:
    for attempt in (1, 2, 3):
        waits = [wait_before(attempt) for _ in range(50)]
        whole = client.FIRST_WAIT * 2 ** (attempt - 1)
        assert all(whole / 2 <= wait <= whole for wait in waits)
        assert len(set(waits)) > 1
    assert [retry_after(text) for text in ("3", "-1", "nan?", None, "inf")] == [3.0, 0.0, None, None, None]
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("ceilings", [Ceilings(tokens=400), Ceilings(money=0.0004, price_read=1.0, price_written=1.0)])
def test_cost_cap_reached(tmp_path: Path, ceilings: Ceilings) -> None:
    """Stops with one line before a request could pass the ceiling; what was paid for is there for the next command."""
    with stub(lambda *_: "x") as told:
        with asking(told, tmp_path, ceilings) as asker, pytest.raises(CeilingError, match="all answers are kept"):
            asker.ask(questions(told, 50))
        paid = len(told.asked)
        assert 0 < asker.budget.tokens <= 400
        assert paid == asker.budget.requests
        with asking(told, tmp_path) as asker:
            asker.ask(questions(told, 50))
        assert len(told.asked) == 50
        assert asker.budget.reused == paid


def test_what_the_endpoint_does_not_tell_counts_as_the_most(tmp_path: Path) -> None:
    free = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}}
    with stub(lambda *_: free) as told, asking(told, tmp_path) as asker:
        asker.ask(questions(told, 1))
        assert asker.budget.tokens == questions(told, 1)[0].most_tokens


def test_a_refusal_is_one_line_and_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANARY_API_KEY", KEY)
    with stub(lambda *_: (401, {}, f"the key {KEY} is wrong")) as told, asking(told, tmp_path) as asker:
        with pytest.raises(GranaryError, match=r"HTTP 401 .*the key \*\*\* is wrong.*GRANARY_API_KEY") as raised:
            asker.ask(questions(told, 1))
        assert KEY not in str(raised.value)
        assert len(told.asked) == 1
        assert told.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_nothing_listens(tmp_path: Path) -> None:
    told = Stub(lambda *_: "", url="http://127.0.0.1:9/v1")
    with asking(told, tmp_path) as asker, pytest.raises(GranaryError, match="can't be reached"):
        asker.ask(questions(told, 8))


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("localhost:8000", None, "write the URL"),
        ("http://me:secret@host/v1", None, "holds a password"),
        ("https://host/v1?key=secret", None, "without . and #"),
        ("http://host/v1", "k", "unencrypted"),
        ("https://host/v1", "a\nb", "is no key"),
    ],
)
def test_wrong_endpoints_are_told(monkeypatch: pytest.MonkeyPatch, url: str, key: str | None, message: str) -> None:
    if key is not None:
        monkeypatch.setenv("GRANARY_API_KEY", key)
    with pytest.raises(GranaryError, match=message) as raised:
        Endpoint.of(url, "GRANARY_API_KEY", 1, 1.0, 0)
    assert "secret" not in str(raised.value)


def test_an_end_in_the_middle_does_not_wait_for_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 1000.0)
    with stub(lambda *_: (429, {"Retry-After": "500"}, "")) as told, asking(told, tmp_path) as asker:
        thread = threading.Thread(target=asker.ask, args=[questions(told, 2)])
        thread.start()
        while len(told.asked) < 2:
            pass
        asker.__exit__()
        thread.join()
