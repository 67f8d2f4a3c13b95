"""Every region like this one: ``granary inspect regions runs/pictures 7``.

All regions of the store's images, ranked by one latent's activation; with --json for programs.
"""

import argparse
import json
from pathlib import Path

from shared.basics.config import Split
from shared.basics.files import write_text
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole
from stage_inspect.find import latents_url


def main(argv: list[str] | None = None) -> None:
    """Rank; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog=f"{program('inspect')} regions", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a latents folder (or its URL)")
    parser.add_argument("latent", type=int, help="its number")
    parser.add_argument("--count", type=int, default=20, help="regions listed (20)")
    parser.add_argument("--split", choices=[split.value for split in Split], default="all", help="of the store")
    parser.add_argument("--contexts", type=int, help="so many of them, evenly spaced; default: all")
    add_places(parser)
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        rank(arguments)


def add_places(parser: argparse.ArgumentParser) -> None:
    """What both commands of this room are told: where things are, and where the result goes."""
    parser.add_argument("--sae", metavar="FOLDER", help="the dictionary, where it has moved")
    parser.add_argument("--store", metavar="URL", help="the store, where it has moved")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")


def rank(arguments: argparse.Namespace) -> None:
    """Look, show and write; raises GranaryError for every wrong input before the pass."""
    from tqdm import tqdm

    from stage_inspect.regions.looking import Looking, as_json

    looking = Looking.open(latents_url(arguments.run), arguments.sae, arguments.store)
    with tqdm(unit="tok", unit_scale=True, desc="regions") as bar:
        found = looking.regions(
            arguments.latent,
            count=arguments.count,
            split=Split(arguments.split),
            contexts=arguments.contexts,
            tell=bar.update,
        )
    console = ShownConsole(soft_wrap=True)
    console.print(f"latent {found.latent} fires on {found.fired:,} of {found.seen:,} regions of images")
    for one in found.regions:
        left, top, right, bottom = one.box
        where = f"context {one.context}, image {one.number}, row {one.row}, column {one.col}"
        console.print(f"{one.value:10.4g}  {where}, pixels {left:.0f},{top:.0f},{right:.0f},{bottom:.0f}", markup=False)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(as_json(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
