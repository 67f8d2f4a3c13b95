"""Requests to an OpenAI-compatible endpoint, and what of an answer is read. An answer is data from a stranger."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from shared.basics.documents import parse_json, typed_at
from shared.basics.errors import GranaryError

ALTERNATIVES = 20  # tokens whose chance is asked for at each place; the most that OpenAI gives


@dataclass(frozen=True)
class Request:
    """What is sent: a route below the endpoint's URL and a JSON body."""

    url: str
    """Of the endpoint, without a slash at its end: ``https://host/v1``."""
    route: str
    """``chat/completions``, ``completions`` or ``embeddings``."""
    body: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the whole request: what its answer is kept under."""
        return hashlib.sha256(json.dumps([self.url, self.route, self.body], sort_keys=True).encode()).hexdigest()

    @property
    def most_tokens(self) -> int:
        """More tokens than this can't cost, by a rule: one for two bytes sent, and all that may be written."""
        sent = {key: value for key, value in self.body.items() if key in ("messages", "prompt", "input")}
        return len(json.dumps(sent, ensure_ascii=False).encode()) // 2 + self.written_tokens

    @property
    def written_tokens(self) -> int:
        """The most tokens that the answer may have."""
        return int(self.body.get("max_tokens", 0))


@dataclass(frozen=True)
class Token:
    """A token that a model wrote or read, with what could have stood in its place."""

    text: str
    logprob: float
    others: dict[str, float]
    """Log probability of each token that was likely there, by its text; itself among them."""


@dataclass(frozen=True)
class Failure:
    """A request without an answer that can be used, and why."""

    reason: str
    is_endpoints: bool = True
    """Whether asking again may help: the endpoint failed, the model did not."""


@dataclass(frozen=True)
class Usage:
    """Tokens that an answer cost."""

    read: int
    written: int


def chat(
    url: str, model: str, system: str, user: str | list[dict[str, Any]], *, max_tokens: int, logprobs: bool = False
) -> Request:
    """One question, a text or parts of texts and images, answered as likely as can be (temperature 0)."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body: dict[str, Any] = {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": ALTERNATIVES}
    return Request(url, "chat/completions", body)


def echo(url: str, model: str, text: str) -> Request:
    """The log probability of every token of `text`; one token is written behind it, since some refuse to write none."""
    body = {"model": model, "prompt": text, "temperature": 0, "max_tokens": 1, "echo": True, "logprobs": 1}
    return Request(url, "completions", body)


def embedding(url: str, model: str, texts: list[str]) -> Request:
    """A vector for each text."""
    return Request(url, "embeddings", {"model": model, "input": texts})


def usage_of(answer: str) -> Usage | None:
    """What the endpoint says that it cost; None where it says nothing that could be true."""
    try:
        told = typed_at(parse_json(answer, "answer"), "usage", dict[str, Any], "answer")
    except GranaryError:
        return None
    read, written = told.get("prompt_tokens"), told.get("completion_tokens", 0)
    if type(read) is not int or type(written) is not int or min(read, written) < 0:
        return None
    return Usage(read, written)


def is_answer(route: str, answer: str) -> bool:
    """Whether the text has the form of an answer to this route."""
    try:
        reader = {"chat/completions": text_of, "completions": read_tokens_or_none, "embeddings": vectors_of}[route]
        reader(answer)
    except GranaryError:
        return False
    return True


def text_of(answer: str) -> str:
    """What a chat model wrote; empty where it wrote nothing. Raises GranaryError for what is no answer."""
    message = typed_at(_choice(answer), "message", dict[str, Any], "answer")
    content = message.get("content")
    return content if isinstance(content, str) else ""


def written_tokens(answer: str) -> list[Token] | None:
    """The tokens of what a chat model wrote; None where the endpoint gives no log probabilities."""
    told = _choice(answer).get("logprobs")
    rows = told.get("content") if isinstance(told, dict) else None
    if not isinstance(rows, list) or not rows:
        return None
    try:
        return [
            Token(
                str(row["token"]),
                float(row["logprob"]),
                {str(one["token"]): float(one["logprob"]) for one in row.get("top_logprobs") or []},
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def read_tokens_or_none(answer: str) -> list[tuple[int, float]] | None:
    """(place in the text, log probability) of each token of an echo; None where the endpoint gives none.

    The first token has no log probability, and is left out.
    """
    told = _choice(answer).get("logprobs")
    if not isinstance(told, dict):
        return None
    values, places = told.get("token_logprobs"), told.get("text_offset")
    if not isinstance(values, list) or not isinstance(places, list) or len(values) != len(places):
        return None
    found = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    if not found or not all(type(place) is int and _is_number(value) for place, value in found):
        return None
    return found


def vectors_of(answer: str) -> list[list[float]]:
    """The vectors of an embedding's answer, in the order of the texts. Raises GranaryError."""
    rows = typed_at(parse_json(answer, "answer"), "data", list[dict[str, Any]], "answer")
    ordered = sorted(rows, key=lambda row: typed_at(row, "index", int, "answer"))
    vectors = [typed_at(row, "embedding", list[Any], "answer") for row in ordered]
    if len({len(vector) for vector in vectors}) != 1 or not all(_is_number(x) for vector in vectors for x in vector):
        raise GranaryError("the answer holds no vectors of one length")
    return vectors


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _choice(answer: str) -> dict[str, Any]:
    choices = typed_at(parse_json(answer, "answer"), "choices", list[dict[str, Any]], "answer")
    if not choices:
        raise GranaryError("the answer has no choices")
    found: dict[str, Any] = choices[0]
    return found
