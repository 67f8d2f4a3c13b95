"""Asks an OpenAI-compatible endpoint by plain HTTP: side by side, again after a failure, never twice for one answer.

An answer is kept in the notes, under the hash of its request, before anything is made of it. A process that is killed
loses what was on its way: at most as many requests as run side by side. The key comes from an environment variable and
goes into one header; it is in no file, no log and no error.
"""

import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from shared.basics.display import MASK, SECRET, masked, refuse_password
from shared.basics.documents import shortened
from shared.basics.errors import GranaryError, told_of
from shared.latents.notes import Notes
from stage_inspect.explain.endpoint.budget import Budget
from stage_inspect.explain.endpoint.request import Failure, Request, Usage, is_answer, usage_of

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "GRANARY_API_KEY"
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # statuses after which asking again may help
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before the second try; each later one waits twice as long, up to this
LONGEST_TOLD_WAIT = 600.0  # seconds of a Retry-After that are obeyed
DOWN_AFTER = 3  # requests in a row that could not even connect


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and how hard to try."""

    url: str
    key: str | None = None
    variable: str = KEY_VARIABLE
    """Where the key came from."""
    concurrency: int = 8
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    retries: int = 5

    @classmethod
    def of(cls, url: str, variable: str, concurrency: int, timeout: float, retries: int) -> Self:
        """Raises GranaryError for a URL that is none or holds a secret, and for a key that would travel in clear."""
        refuse_password(url)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GranaryError(
                f"--endpoint {masked(url)}: write the URL below which chat/completions is, http://host/v1"
            )
        if parts.query or parts.fragment or SECRET.search(url):
            raise GranaryError(f"--endpoint {masked(url)}: a URL without ? and #; a key goes into ${variable}")
        key = os.environ.get(variable) or None
        if key is not None and (not key.isascii() or not key.isprintable() or " " in key):
            raise GranaryError(f"${variable} is no key: it has spaces or signs that no header can hold")
        if key is not None and parts.scheme == "http" and not is_this_machine(parts.hostname):
            raise GranaryError(
                f"${variable} would travel unencrypted to {parts.hostname}: give an https URL, or unset it"
            )
        if concurrency < 1 or retries < 0 or not 0 < timeout < float("inf"):
            raise GranaryError("--concurrency is at least 1, --retries at least 0, --timeout above 0")
        return cls(url.rstrip("/").removesuffix("/chat/completions"), key, variable, concurrency, timeout, retries)


class Asker:
    """Answers to requests, from the notes where they are there. Use it as a context manager."""

    def __init__(self, endpoint: Endpoint, notes: Notes, budget: Budget) -> None:
        import httpx

        self.endpoint, self.notes, self.budget = endpoint, notes, budget
        self._unreachable = 0
        self._is_over = threading.Event()
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        self._http = httpx.Client(headers=headers, timeout=endpoint.timeout, limits=limits)
        self._pool = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="granary-ask")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown(cancel_futures=True)
        self._http.close()

    def ask(self, requests: Sequence[Request]) -> list[str | Failure]:
        """The answers, as the endpoint wrote them, in the order of the requests; equal requests are asked once.

        Raises CeilingError where the next one could pass a ceiling, and GranaryError for an endpoint that can't be
        reached or refuses. What was on its way then is waited for and kept.
        """
        different = {request.sha256: request for request in requests}
        waiting = [self._pool.submit(self._answer, key, request) for key, request in different.items()]
        found: dict[str, str | Failure] = {}
        error: GranaryError | None = None
        for key, future in zip(different, waiting, strict=True):
            if error is not None and future.cancel():
                continue
            try:
                found[key] = future.result()
            except GranaryError as raised:
                error = error or raised
        if error is not None:
            raise error
        return [found[request.sha256] for request in requests]

    def _answer(self, key: str, request: Request) -> str | Failure:
        kept = self.notes.answer(key)
        if kept is not None:
            self.budget.reuse()
            return kept
        reason = "nothing was asked"
        for attempt in range(self.endpoint.retries + 1):
            aside = self.budget.set_aside(request)
            cost: Usage | None = Usage(0, 0)
            try:
                response = self._send(request)
                if isinstance(response, str):
                    reason, told_wait = response, None
                elif response.status_code == 200:
                    cost = usage_of(response.text)
                    if is_answer(request.route, response.text):
                        self.notes.keep_answer(key, response.text)
                        return response.text
                    reason, told_wait = "what the endpoint sent is no answer", None
                elif response.status_code in AGAIN:
                    reason, told_wait = f"HTTP {response.status_code}", retry_after(response.headers.get("retry-after"))
                else:
                    raise GranaryError(self._refused(request, response))
            finally:
                self.budget.settle(aside, cost)
            if attempt < self.endpoint.retries:
                wait = max(wait_before(attempt + 1), min(told_wait or 0, LONGEST_TOLD_WAIT))
                if self._is_over.wait(wait):
                    break
        return Failure(f"{reason}, {self.endpoint.retries + 1} times")

    def _send(self, request: Request) -> "httpx.Response | str":
        """The response, or why there is none. Raises GranaryError where nothing listens there."""
        import httpx

        try:
            response = self._http.post(f"{request.url}/{request.route}", json=request.body)
            self._unreachable = 0
            return response
        except httpx.ConnectError as error:
            self._unreachable += 1
            if self._unreachable >= DOWN_AFTER * (self.endpoint.retries + 1):
                raise GranaryError(f"{self.endpoint.url} can't be reached ({self._told(told_of(error))})") from None
            return "no connection"
        except httpx.TimeoutException:
            return f"no answer within {self.endpoint.timeout:g} s"
        except httpx.HTTPError as error:
            return self._told(told_of(error))

    def _refused(self, request: Request, response: "httpx.Response") -> str:
        """One line for a status that asking again would not change."""
        said = self._told(shortened(" ".join(response.text[:2000].split())))
        key = self.endpoint.variable
        hint = {401: f": set ${key}", 403: f": see ${key}", 404: ": see --endpoint and --model"}
        asked = request.body.get("logprobs") and response.status_code in (400, 422)
        tail = hint.get(response.status_code, ": if it gives no log probabilities, --no-logprobs" if asked else "")
        return f"{request.url}/{request.route} answers HTTP {response.status_code} {said}{tail}"

    def _told(self, text: str) -> str:
        """What another says, without the key."""
        return masked(text.replace(self.endpoint.key, MASK) if self.endpoint.key else text)


def wait_before(attempt: int) -> float:
    """Seconds before try number `attempt` (1 is the first repetition): between half and all of a doubling wait."""
    return random.uniform(0.5, 1.0) * float(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)))


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date. None for neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
        return max(0.0, seconds) if seconds < float("inf") else None
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def is_this_machine(host: str) -> bool:
    """Whether a name or an address is the loopback."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
