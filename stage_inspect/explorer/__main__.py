"""Look at what each latent does: ``granary explore RUN``, a page on this machine's own address.

granary explore runs/demo                          # serve it, with the model on the spot
granary explore runs/demo --folder site            # the same pages as files for any web host
granary explore runs/demo --html latents.html      # 200 latents in one file that opens from disk
"""

import argparse
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from shared.basics.errors import GranaryError
from shared.basics.pages_link import link_pages, reports_of
from shared.basics.run_folder import RunFolder
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.stage import drop_chatter
from stage_inspect.find import latents_url

if TYPE_CHECKING:
    from stage_inspect.explorer.documents import Documents
    from stage_inspect.regions.looking import Looking

BESIDE = Path("beside the latents")  # what --folder and --html mean without a name
PORT = 8734
PORTS_TRIED = 20


def main(argv: list[str] | None = None) -> None:
    """Run it; a wrong input is one line on stderr and status 2."""
    drop_chatter()
    with ending_in_one_line(on_interrupt=None):
        run(parse(argv))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog=program("explore"), description="Look at what each latent does.")
    parser.add_argument(
        "run", nargs="+", help="run folder, or the URL of a latents folder; several are served side by side"
    )
    parser.add_argument("--port", type=int, help=f"where to serve it; default: the first free one from {PORT}")
    parser.add_argument("--no-model", action="store_true", help="without the pages that run the language model")
    parser.add_argument("--model", help="model folder, hub id or bundled; default: the one that was harvested")
    parser.add_argument("--dictionary", type=Path, help="folder of the dictionary; default: where it was")
    written = "; without a name: beside the latents as {}, where the reports link to it"
    parser.add_argument("--store", metavar="URL", help="the store, for searches; default: where it was")
    told = "write the pages into this folder, for any web host, and end" + written.format("explorer/")
    parser.add_argument("--folder", type=Path, nargs="?", const=BESIDE, help=told)
    told = "write one HTML file of some latents, and end" + written.format("latents.html")
    parser.add_argument("--html", type=Path, nargs="?", const=BESIDE, help=told)
    told = "write what --html shows as JSON, for programs, and end" + written.format("latents.json")
    parser.add_argument("--json", type=Path, nargs="?", const=BESIDE, help=told.partition(", where")[0])
    parser.add_argument(
        "--latents", help="which go into --html and --json: numbers separated by commas; default: 200 by chance"
    )
    arguments = parser.parse_args(argv)
    of_one = ("folder", "html", "json", "model", "dictionary", "store")
    if len(arguments.run) > 1 and any(getattr(arguments, name) for name in of_one):
        parser.error("--folder, --html, --json, --model, --dictionary and --store are for one run")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Serve or write."""
    from stage_inspect.explorer.feeds import connect

    opened = [open_run(url) for url in arguments.run]
    connect(opened, say)
    if arguments.folder is None and arguments.html is None and arguments.json is None:
        serve(opened, arguments)
        return
    from stage_inspect.explorer import publish

    documents, own = opened[0], run_of(opened[0])
    folder = own.pages if arguments.folder is BESIDE else arguments.folder
    file = own.pages_file if arguments.html is BESIDE else arguments.html
    twin = own.pages_file.with_suffix(".json") if arguments.json is BESIDE else arguments.json
    if folder is not None:
        count = publish.write_folder(documents, folder)
        say(f"{count:,} latents in {folder}: put the folder on a web host, or python -m http.server -d it")
    chosen = numbers(arguments.latents) if arguments.latents else publish.chosen_by_chance(documents)
    if twin is not None:
        publish.write_json(documents, chosen, twin)
        say(f"{len(set(chosen)):,} latents in {twin}, for programs")
    if file is not None:
        publish.write_page(documents, chosen, file)
        say(f"{len(set(chosen)):,} latents in {file}, which opens in a browser")
    if "://" not in documents.latents.url:
        for report in reports_of(own.path):
            link_pages(report)


def run_of(documents: "Documents") -> RunFolder:
    """The run that a latents folder is of: where its pages go, and its reports lie."""
    url = documents.latents.url
    return RunFolder(Path() if "://" in url else Path(url).parent)


def open_run(url: str) -> "Documents":
    """The latents folder of a run, or the one at `url`, called by the run's name. Raises GranaryError."""
    from shared.latents import Latents
    from stage_inspect.explorer.documents import Documents

    path = latents_url(url)
    parts = [part for part in path.rstrip("/").split("/") if part not in ("", ".")]
    is_of_a_run = len(parts) > 1 and parts[-1] == RunFolder(Path()).latents.name
    return Documents(Latents.open(path), parts[-2] if is_of_a_run else parts[-1])


def serve(opened: "list[Documents]", arguments: argparse.Namespace) -> None:
    """Answer on this machine's loopback address until Ctrl-C."""
    try:
        import uvicorn

        from stage_inspect.explorer.guard import HOST
        from stage_inspect.explorer.searching import Place, Searching
        from stage_inspect.explorer.server import Run, make_app
    except ModuleNotFoundError as error:
        raise GranaryError(f"the explorer needs {error.name}: pip install 'granary-sae[explore]'") from error
    runs = []
    for documents in opened:
        live, why_not = None, "it was started with --no-model"
        if not arguments.no_model:
            from stage_inspect.explorer.live import Live, LiveSettings

            try:
                settings = LiveSettings.find(documents.latents, arguments.model, arguments.dictionary)
                live, why_not = Live(documents.latents, settings), ""
            except GranaryError as error:
                if arguments.model or arguments.dictionary:
                    raise
                why_not = str(error)
                say(f"without the pages that run the model: {error}")
        sae = arguments.dictionary if live is None else live.settings.dictionary
        searching = Searching(Place(documents.latents.url, None if sae is None else str(sae), arguments.store))
        runs.append(Run(documents, live, why_not, searching, looking_at(documents, sae, arguments.store)))
    listening = bind(HOST, arguments.port)
    port = listening.getsockname()[1]
    say(f"{', '.join(one.title for one in opened)}: http://{HOST}:{port}/  (Ctrl-C ends it)")
    config = uvicorn.Config(make_app(runs, port), log_level="warning", access_log=False, server_header=False, ws="none")
    uvicorn.Server(config).run(sockets=[listening])


def looking_at(documents: "Documents", sae: Path | None, store: str | None) -> "Looking | None":
    """What looks at the images of the store that the folder is of; None, and said so, where that is not here."""
    from stage_inspect.regions.looking import Looking

    if not documents.latents.has_pictures:
        return None
    try:
        return Looking.open(documents.latents.url, None if sae is None else str(sae), store)
    except GranaryError as error:
        if store:
            raise
        say(f"without the page of the store's images: {error}")
        return None


def bind(host: str, port: int | None) -> socket.socket:
    """A socket that listens at `port`, or at the first free one. Raises GranaryError where that is taken."""
    for number in [port] if port is not None else range(PORT, PORT + PORTS_TRIED):
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, number))
            listening.listen(128)
            return listening
        except (OSError, OverflowError):
            listening.close()
    raise GranaryError(f"port {port if port is not None else PORT} can't be had: choose another with --port")


def numbers(text: str) -> list[int]:
    """``3,14,15`` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise GranaryError(f"--latents {text}: give numbers separated by commas") from None


def say(line: str) -> None:
    """One line for the reader."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
