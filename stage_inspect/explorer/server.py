"""The explorer's server: the pages' files, their documents, and what only a server can do.

GET  /                       the page; all of its addresses are behind a #
GET  /static/{name}          its modules, style and icon: a table of what is in the package, no path is looked up
GET  /data/...               `documents`
GET  /data/picture/{name}    a thumbnail, by its hash
GET  /api/search?q=          latents by words
GET, POST /api/lists         lists of latents
POST /api/note/{latent}      a note
POST /api/said/{latent}      a person's explanation
POST /api/text, /api/steer   the model on the spot
GET  /api/images/{context}   the images of a context of the store
POST /api/box                the latents that fire in a box of one
GET, POST /api/find          a search for a concept's latents: how far it is, and its start
POST /api/find/cancel        its end
/with/{n}/...                the same for each further run
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from shared.basics.config import Split
from shared.basics.documents import parse_json, typed
from shared.basics.errors import GranaryError
from shared.text.python import CONCEPTS as PYTHON
from stage_inspect.concepts.question import Question
from stage_inspect.explorer.documents import Documents
from stage_inspect.explorer.guard import Guard
from stage_inspect.explorer.limits import (
    BODY_BYTES,
    CONCEPT_CHARACTERS,
    CONCEPTS,
    GENERATED_TOKENS,
    LIST_LATENTS,
    NAME_CHARACTERS,
    NOTE_CHARACTERS,
    QUERY_CHARACTERS,
    TEXT_CHARACTERS,
)
from stage_inspect.explorer.pictures import boxed, images_of
from stage_inspect.explorer.searching import Searching

if TYPE_CHECKING:
    from stage_inspect.explorer.live import Live
    from stage_inspect.regions.looking import Looking

PERSON = "person"  # the method of an explanation that someone wrote
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}


@dataclass(frozen=True)
class Run:
    """One latents folder as it is served."""

    documents: Documents
    live: "Live | None"
    why_not: str = ""
    """Why there is no live model."""
    searching: Searching | None = None
    """Starts searches for concepts; None: nobody may."""

    looking: "Looking | None" = None
    """Looks at the store's images; None where there is no store beside the folder, or it has none."""

    @property
    def can_search(self) -> bool:
        """Whether a search can be started, and its result be kept."""
        return self.searching is not None and self.documents.latents.notes.writable


@cache
def static_files() -> Mapping[str, bytes]:
    """The files of the pages by name."""
    folder = files("stage_inspect.explorer") / "static"
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


def make_app(runs: Sequence[Run], port: int) -> Starlette:
    """The application for these runs, the first of them at the root; with it ends every search that it started."""
    first, *others = runs
    siblings = [{"number": number, "title": run.documents.title} for number, run in enumerate(others, start=1)]
    mounted = [Mount(f"/with/{number}", routes=routes(run, [])) for number, run in enumerate(others, start=1)]

    @asynccontextmanager
    async def ending_searches(_: Starlette) -> AsyncIterator[None]:
        yield
        for run in runs:
            if run.searching is not None:
                await run_in_threadpool(run.searching.cancel)

    app = Starlette(
        routes=[*mounted, *routes(first, siblings)],
        middleware=[Middleware(Guard, port=port), Middleware(GZipMiddleware, minimum_size=1000, compresslevel=3)],
        exception_handlers={GranaryError: refused, 404: missing, 405: missing},
        lifespan=ending_searches,
    )
    app.router.redirect_slashes = False
    return app


def routes(run: Run, siblings: list[dict[str, Any]]) -> list[Route]:
    """All of one run."""
    documents, notes = run.documents, run.documents.latents.notes
    live = {"characters": TEXT_CHARACTERS, "generated": GENERATED_TOKENS} if run.live is not None else None
    find = {
        "concepts": CONCEPTS,
        "characters": CONCEPT_CHARACTERS,
        "python": PYTHON,
        "splits": [split.value for split in Split],
    }

    async def page(_: Request) -> Response:
        return Response(static_files()["index.html"], media_type="text/html")

    async def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in static_files() or name == "index.html":
            return missing(request, None)
        return Response(static_files()[name], media_type=TYPES[name[name.rindex(".") :]])

    def meta(_: Request) -> Response:
        return answer(
            documents.meta(
                live=live,
                steer=run.live is not None and run.live.can_steer,
                writable=notes.writable,
                find=find if run.can_search else None,
                box={"contexts": run.looking.num_contexts} if run.looking is not None else None,
                siblings=siblings,
            )
        )

    def concepts(_: Request) -> Response:
        return answer(documents.concepts())

    def column(request: Request) -> Response:
        name = request.path_params["name"].rpartition(".")[0]
        # As they are: numbers hardly shrink, and packing a megabyte takes longer than to send it within the machine.
        packed = {"Content-Encoding": "identity"}
        return Response(documents.column(name), media_type="application/octet-stream", headers=packed)

    def latent(request: Request) -> Response:
        return answer(documents.latent(request.path_params["index"]))

    def more(request: Request) -> Response:
        return answer(documents.more(request.path_params["index"]))

    def rows(request: Request) -> Response:
        return answer(documents.rows(request.path_params["block"]))

    def picture(request: Request) -> Response:
        data = documents.latents.thumbnail(request.path_params["digest"])
        return Response(data, media_type="image/webp", headers={"Content-Encoding": "identity"})

    def search(request: Request) -> Response:
        return answer(documents.search(request.query_params.get("q", "")[:QUERY_CHARACTERS]))

    def get_lists(_: Request) -> Response:
        return answer({"lists": notes.lists()})

    def put_list(body: Mapping[str, Any]) -> Any:
        name, on = text(body, "list", NAME_CHARACTERS), body.get("on")
        latent = whole(body, "latent", documents.latents.num_latents)
        if not name or not isinstance(on, bool):
            raise GranaryError("give a list's name, a latent, and whether it is on the list")
        now = [one for one in notes.lists().get(name, []) if one != latent]
        if on and len(now) >= LIST_LATENTS:
            raise GranaryError(f"a list holds {LIST_LATENTS:,} latents at most")
        notes.set_list(name, [*now, latent] if on else now or None)
        return {"lists": notes.lists()}

    def put_note(body: Mapping[str, Any], latent: int) -> Any:
        if latent >= documents.latents.num_latents:
            raise GranaryError(f"there is no latent {latent}")
        notes.set_note(latent, text(body, "text", NOTE_CHARACTERS).strip())
        return {}

    def put_said(body: Mapping[str, Any], latent: int) -> Any:
        if latent >= documents.latents.num_latents:
            raise GranaryError(f"there is no latent {latent}")
        said = text(body, "text", NOTE_CHARACTERS).strip()
        former = body.get("id")
        if former is not None and not isinstance(former, int):
            raise GranaryError("id must be that of an explanation, or null")
        if former in {one.id for one in notes.explanations(latent) if one.method == PERSON}:
            notes.remove_explanation(former)  # its scores were of the former text
        if said:
            notes.add_explanation(latent, said, method=PERSON, author="explorer")
        return {}

    def read_text(body: Mapping[str, Any]) -> Any:
        return working(run).read(text(body, "text", TEXT_CHARACTERS))

    def steer(body: Mapping[str, Any]) -> Any:
        return working(run).steer(
            text(body, "prompt", TEXT_CHARACTERS),
            whole(body, "latent", documents.latents.num_latents),
            text(body, "mode", NAME_CHARACTERS),
            number(body, "strength"),
            whole(body, "tokens", GENERATED_TOKENS + 1),
        )

    def images(request: Request) -> Response:
        return answer(images_of(looking(run), request.path_params["context"]))

    def box(body: Mapping[str, Any]) -> Any:
        given = body.get("box")
        if not isinstance(given, list) or len(given) != 4:
            raise GranaryError("box must be a list of left, top, right and bottom")
        sides = [number({"box": side}, "box") for side in given]
        place = looking(run)
        return boxed(place, whole(body, "context", place.num_contexts), whole(body, "number", 1 << 16), sides)

    def get_search(_: Request) -> Response:
        return answer(searching(run).progress())

    def start_search(body: Mapping[str, Any]) -> Any:
        return searching(run).start(question(body))

    def cancel_search(_: Mapping[str, Any]) -> Any:
        return searching(run).cancel()

    return [
        Route("/", page),
        Route("/static/{name}", static),
        Route("/data/meta.json", meta),
        Route("/data/concepts.json", concepts),
        Route("/data/column/{name}", column),
        Route("/data/latent/{index:int}.json", latent),
        Route("/data/more/{index:int}.json", more),
        Route("/data/rows/{block:int}.json", rows),
        Route("/data/picture/{digest}.webp", picture),
        Route("/api/search", search),
        Route("/api/lists", get_lists, methods=["GET"]),
        Route("/api/lists", posted(put_list), methods=["POST"]),
        Route("/api/note/{latent:int}", posted(put_note), methods=["POST"]),
        Route("/api/said/{latent:int}", posted(put_said), methods=["POST"]),
        Route("/api/text", posted(read_text), methods=["POST"]),
        Route("/api/steer", posted(steer), methods=["POST"]),
        Route("/api/images/{context:int}", images),
        Route("/api/box", posted(box), methods=["POST"]),
        Route("/api/find", get_search, methods=["GET"]),
        Route("/api/find", posted(start_search), methods=["POST"]),
        Route("/api/find/cancel", posted(cancel_search), methods=["POST"]),
    ]


def posted(work: Callable[..., Any]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that gives `work` the request's JSON object, and the parameters of its path, in a thread."""

    async def endpoint(request: Request) -> Response:
        received = b""
        async for part in request.stream():
            received += part
            if len(received) > BODY_BYTES:
                raise GranaryError("the request is too long")
        body = typed(dict[str, Any], parse_json(received, "the request"), "the request")
        return answer(await run_in_threadpool(work, body, **request.path_params))

    return endpoint


def working(run: Run) -> "Live":
    """The live model, or GranaryError with the reason why there is none."""
    if run.live is None:
        raise GranaryError(run.why_not)
    return run.live


def searching(run: Run) -> Searching:
    """What starts this run's searches, or GranaryError where its notes can't keep a result."""
    if run.searching is None or not run.can_search:
        raise GranaryError("the notes of this latents folder can't be written: use granary inspect find")
    return run.searching


def looking(run: Run) -> "Looking":
    """What looks at the store's images, or GranaryError where there are none."""
    if run.looking is None:
        raise GranaryError("there is no store with images beside this latents folder: give --store")
    return run.looking


def question(body: Mapping[str, Any]) -> Question:
    """What a request looks for; a file of spans is for the command alone."""
    python, regex, token = (texts(body, kind, CONCEPTS, CONCEPT_CHARACTERS) for kind in ("python", "regex", "token"))
    if len(python) + len(regex) + len(token) > CONCEPTS:
        raise GranaryError(f"look for {CONCEPTS} concepts at a time at most")
    split = body.get("split", Split.heldout.value)
    if split not in [one.value for one in Split]:
        raise GranaryError(f"split must be one of {', '.join(one.value for one in Split)}")
    contexts = None if body.get("contexts") is None else whole(body, "contexts", 1 << 40)
    return Question(python=python, regex=regex, token=token, split=Split(split), contexts=contexts)


def texts(body: Mapping[str, Any], key: str, most: int, longest: int) -> list[str]:
    """A list of strings of the request, empty where it is left out."""
    found = body.get(key, [])
    if not isinstance(found, list) or len(found) > most:
        raise GranaryError(f"{key} must be a list of at most {most} texts")
    return [text({key: one}, key, longest) for one in found]


def text(body: Mapping[str, Any], key: str, longest: int) -> str:
    """A string of the request."""
    found = body.get(key)
    if not isinstance(found, str) or len(found) > longest:
        raise GranaryError(f"{key} must be a text of at most {longest:,} characters")
    return found


def whole(body: Mapping[str, Any], key: str, stop: int) -> int:
    """An integer of the request, from 0 to below `stop`."""
    found = body.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < stop:
        raise GranaryError(f"{key} must be a whole number from 0 to {stop - 1}")
    return found


def number(body: Mapping[str, Any], key: str) -> float:
    """A number of the request."""
    found = body.get(key)
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise GranaryError(f"{key} must be a number")
    return float(found)


def encoded(document: Any) -> bytes:
    """A document as JSON."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def answer(document: Any) -> Response:
    """A document as a response."""
    return Response(document if isinstance(document, bytes) else encoded(document), media_type="application/json")


def refused(_: Request, error: Exception) -> Response:
    """A GranaryError as its sentence."""
    return Response(encoded({"error": str(error)}), status_code=400, media_type="application/json")


def missing(_: Request, __: Any) -> Response:
    """There is no such page."""
    return Response(encoded({"error": "there is no such page"}), status_code=404, media_type="application/json")
