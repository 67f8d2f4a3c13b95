"""Write a latents folder as another project's files: ``granary inspect export runs/demo out --to parquet``."""

import argparse
import importlib
from pathlib import Path

from shared.basics.disk import telling_disk_errors
from shared.basics.errors import GranaryError
from shared.basics.files import making_folder
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from stage_inspect.find import latents_url

FORMATS = ("neuronpedia", "saedashboard", "delphi", "parquet")
EXPORT = """\
Write a latents folder as the files of another project.

  neuronpedia    the folder of its bulk import, and payloads of its web upload (upload/)
  saedashboard   batch-{i}.json
  delphi         a cache of latents that its scorers read
  parquet        latents, examples, related latents
"""


def main(argv: list[str] | None = None) -> None:
    """Export; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog=f"{program('inspect')} export", description=EXPORT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a latents folder (or its URL)")
    parser.add_argument("target", metavar="DST", type=Path, help="new or empty folder")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--latents", metavar="WHICH", help="0:128 or 3,7,9; default: all")
    parser.add_argument("--model-id", metavar="ID", help="what the other project calls the model; default: its name")
    parser.add_argument(
        "--source", metavar="ID", help="LAYER-SET, what it calls the dictionary; default: from the hook"
    )
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        export(arguments)


def export(arguments: argparse.Namespace) -> None:
    """Check, write, say where; raises GranaryError for a target that is not empty."""
    from shared.latents.folder import Latents

    latents = Latents.open(latents_url(arguments.run))
    target: Path = arguments.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GranaryError(f"{target} is there and not empty: choose a new folder")
    hook = latents.meta.dictionary["writes"][-1]
    layer = next((part for part in hook.replace("/", ".").split(".") if part.isdigit()), "0")
    source = arguments.source or (hook if arguments.to == "delphi" else f"{layer}-granary-{hook.rpartition('.')[2]}")
    model_id = arguments.model_id or str(latents.meta.model.get("id", "model")).rpartition("/")[2]
    module = importlib.import_module(f"stage_inspect.export.{arguments.to}")
    source = source.replace("_", "-") if "-" in source else source
    with telling_disk_errors(target), making_folder(target) as filled:
        count = module.write(latents, filled, arguments.latents, model_id, source)
    print(f"{target}: {count} latents to {arguments.to}")  # noqa: T201


if __name__ == "__main__":
    main()
