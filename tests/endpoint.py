"""A stub of an OpenAI-compatible endpoint: a real HTTP server on the loopback that answers as a test wants it to."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Reply = str | dict[str, Any] | tuple[int, dict[str, str], str]
"""What the model writes, a whole answer, or (status, headers, body)."""


@dataclass
class Stub:
    """What was asked, and how to answer."""

    answer: Callable[["Stub", str, Body], Reply]
    url: str = ""
    asked: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Whole answers that were sent, by the request's body."""
    at_once: int = 0
    most_at_once: int = 0


def excerpts(body: Body) -> list[str]:
    """The numbered texts of a question."""
    user = body["messages"][1]["content"]
    return re.split(r"(?:^|\n\n)Excerpt \d+: ", user)[1:]


def chat_answer(text: str, logprobs: list[Body] | None = None) -> Body:
    choice: Body = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


@contextmanager
def stub(answer: Callable[[Stub, str, Body], Reply]) -> Iterator[Stub]:
    """Serve it until the block ends."""
    told, lock = Stub(answer), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                told.asked.append(body)
                told.headers.append(dict(self.headers))
                told.at_once += 1
                told.most_at_once = max(told.most_at_once, told.at_once)
            try:
                self.reply(told.answer(told, self.path, body), body)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with lock:
                    told.at_once -= 1

        def reply(self, reply: Reply, body: Body) -> None:
            status, headers, text = reply if isinstance(reply, tuple) else (200, {}, "")
            if isinstance(reply, str):
                reply = chat_answer(reply)
            if isinstance(reply, dict):
                text = json.dumps(reply)
            data = text.encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            if status == 200:
                with lock:
                    told.answered[json.dumps(body, sort_keys=True)] += 1

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def slowly(seconds: float, text: str) -> Callable[[Stub, str, Body], Reply]:
    """Answers after a while."""

    def answer(_: Stub, __: str, ___: Body) -> Reply:
        time.sleep(seconds)
        return text

    return answer
