"""The explorer's real server in a thread of this process, a plain client for it, and something small to show."""

import gzip
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import uvicorn

from shared.latents import Latents
from shared.sae import SAE
from shared.sae.config import SAEConfig
from shared.sae.for_store import weights_sha256
from shared.sae.sites import Sites
from stage_inspect.explorer.__main__ import bind
from stage_inspect.explorer.guard import HOST
from stage_inspect.explorer.server import Run, make_app
from tests.latents import synthetic_latents

HOOK = "layers.2.resid_post"
LATENTS = 64


@dataclass(frozen=True)
class Answer:
    """A response, unpacked."""

    status: int
    headers: dict[str, str]
    content: bytes
    transferred: int
    """Bytes of the body as they came."""

    def json(self) -> Any:
        return json.loads(self.content)


@dataclass
class Client:
    """Asks the server as its own pages would, unless it is told to lie."""

    port: int

    @property
    def origin(self) -> str:
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, **headers: str) -> Answer:
        return self._ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self._ask("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        try:
            sent = {"Host": f"{HOST}:{self.port}", "Origin": self.origin, "Accept-Encoding": "gzip"}
            sent |= {name.replace("_", "-"): value for name, value in headers.items()}
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            unpacked = gzip.decompress(content) if response.headers.get("content-encoding") == "gzip" else content
            return Answer(
                response.status,
                {name.title(): value for name, value in response.headers.items()},
                unpacked,
                len(content),
            )
        finally:
            connection.close()


@contextmanager
def serving(runs: Sequence[Run]) -> Iterator[Client]:
    """Serve these runs at a free port of this machine until the block ends."""
    listening = bind(HOST, 0)
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(runs, port), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Client(port)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def small_study(folder: Path) -> Path:
    """A random SAE of the bundled model in ``sae``, and beside it a made-up folder of as many latents."""
    generator = torch.Generator().manual_seed(0)
    config = SAEConfig(
        d_model=128, d_latent=LATENTS, activation="topk", k=6, normalisation="none", sites=Sites.of(HOOK)
    )
    SAE(config, generator=generator).save_pretrained(folder / "sae", {"model": {"id": "bundled"}, "hook": HOOK})
    synthetic_latents(folder / "latents", LATENTS)
    return folder


def opened_study(folder: Path, **changes: Any) -> Latents:
    """Its latents as if they were those of the SAE beside them; `changes` of what the folder records."""
    latents = Latents.open(folder / "latents")
    made_of = {**latents.meta.dictionary, "path": str(folder / "sae"), "sha256": weights_sha256(folder / "sae")}
    made_of |= changes.pop("dictionary", {})
    meta = replace(latents.meta, dictionary=made_of, **{"model": {"id": "bundled"}, "tokenizer": {}, **changes})
    return Latents(latents.io, meta)
