"""Take in explanations of others: ``granary inspect import runs/demo explanations/*.jsonl.gz``.

Files are Neuronpedia's exports; a folder is one of delphi's results, with scores.
"""

import argparse
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.basics.documents import parse_json, typed
from shared.basics.errors import GranaryError
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from stage_inspect.find import latents_url

Row = tuple[int, str, str, str, dict[str, Any]]
UNKNOWN = "unknown"
GZIP = b"\x1f\x8b"


def main(argv: list[str] | None = None) -> None:
    """Import; a wrong input is one line on stderr and status 2, and nothing is taken."""
    parser = argparse.ArgumentParser(prog=f"{program('inspect')} import", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a latents folder")
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="JSON lines or a JSON list, also gzipped; or a folder"
    )
    parser.add_argument("--hookpoint", metavar="NAME", help="of delphi's, where its folder holds several")
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        count = take(arguments.run, arguments.files, arguments.hookpoint)
        print(f"{count} explanations taken")  # noqa: T201


def take(run: str, paths: list[Path], hookpoint: str | None = None) -> int:
    """Add the explanations of all files, those that are there already left out; returns how many were added."""
    from shared.latents.folder import Latents
    from stage_inspect.delphi_results import DELPHI, read_results

    latents = Latents.open(latents_url(run))
    there = {(one.latent, one.text, one.method, one.author) for one in latents.notes.explanations()}
    results = [one for path in paths if path.is_dir() for one in read_results(path, hookpoint, latents.num_latents)]
    rows = [row for path in paths if not path.is_dir() for row in read(path, latents.num_latents)]
    new = {row[:4]: row for row in rows if row[:4] not in there}
    latents.notes.add_explanations(list(new.values()))
    count = latents.notes.replace_explanations(DELPHI, UNKNOWN, [one.latent for one in results], results)
    return len(new) + count


def read(path: Path, num_latents: int) -> Iterator[Row]:
    """Explanations of a file; raises GranaryError, naming the line, for one that is none."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(GZIP) else data).decode()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise GranaryError(f"{path} can't be read as explanations: {error}") from None
    if text.lstrip().startswith("["):
        records = typed(list[Any], parse_json(text, path), str(path))
    else:
        lines = filter(None, text.splitlines())
        records = (parse_json(line, f"{path}, explanation {number}") for number, line in enumerate(lines, 1))
    for number, record in enumerate(records, 1):
        yield row(record, f"{path}, explanation {number}", num_latents)


def row(record: Any, where: str, num_latents: int) -> Row:
    """One explanation as the notes keep it."""
    try:
        latent, text = int(record["index"]), str(record["description"]).strip()
    except (KeyError, TypeError, ValueError, OverflowError):
        raise GranaryError(f"{where} has no index and description") from None
    if not 0 <= latent < num_latents or not text:
        raise GranaryError(f"{where} is of latent {latent}, or empty: there are {num_latents} latents")
    kept = {name: record[name] for name in ("id", "modelId", "layer") if isinstance(record.get(name), str)}
    method, author = (str(record.get(name) or UNKNOWN) for name in ("typeName", "explanationModelName"))
    return latent, text, method, author, kept


if __name__ == "__main__":
    main()
