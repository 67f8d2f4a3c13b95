"""Work with SAE folders: ``python -m shared.sae convert SRC DST --to saelens``."""

import argparse
from pathlib import Path

from rich.console import Console

from shared.cli import fail
from shared.errors import GranaryError


def main(argv: list[str] | None = None) -> None:
    """Run one command; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="python -m shared.sae", description="Work with SAE folders.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="write an SAE in another project's format, or read one")
    command.add_argument("source", type=Path, help="folder of an SAE; its format is found from its files")
    command.add_argument("target", type=Path, help="new or empty folder")
    command.add_argument("--to", required=True, help="granary, saelens, sparsify or dictionary_learning")
    arguments = parser.parse_args(argv)
    from shared.sae.formats import convert

    try:
        found = convert(arguments.source, arguments.target, arguments.to)
    except GranaryError as error:
        fail(str(error))
    Console(soft_wrap=True).print(f"{arguments.target}: {found} to {arguments.to}", highlight=False)


if __name__ == "__main__":
    main()
