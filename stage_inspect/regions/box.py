"""The latents that fire in a box of an image: ``granary inspect box runs/pictures 12 --box 10,4,40,30``.

The image is one of a context of the store; the box is left, top, right and bottom in pixels of it.
"""

import argparse
import json

from shared.basics.errors import GranaryError
from shared.basics.files import write_text
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole
from stage_inspect.find import latents_url
from stage_inspect.regions.rank import add_places


def main(argv: list[str] | None = None) -> None:
    """Look; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog=f"{program('inspect')} box", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a latents folder (or its URL)")
    parser.add_argument("context", type=int, help="of the store")
    parser.add_argument("--box", required=True, metavar="L,T,R,B", help="left, top, right and bottom in pixels")
    parser.add_argument("--image", type=int, default=0, help="which image of the context (0)")
    parser.add_argument("--count", type=int, default=20, help="latents listed (20)")
    add_places(parser)
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        look(arguments)


def look(arguments: argparse.Namespace) -> None:
    """Look, show and write; raises GranaryError for every wrong input."""
    from rich.table import Table

    from stage_inspect.regions.looking import Looking, as_json

    box = sides(arguments.box)
    looking = Looking.open(latents_url(arguments.run), arguments.sae, arguments.store)
    found = looking.box(arguments.context, arguments.image, box)
    title = f"{len(found.latents)} latents fire on the {found.regions:.1f} regions inside"
    table = Table(title=title, title_justify="left")
    for name in ("latent", "strength", "mean inside", "outside", "share inside"):
        table.add_column(name, justify="right")
    for one in found.latents[: arguments.count]:
        figures = (f"{value:.4g}" for value in (one.strength, one.inside, one.outside, one.share))
        table.add_row(str(one.latent), *figures)
    ShownConsole(soft_wrap=True).print(table)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(as_json(found), indent=1) + "\n")


def sides(text: str) -> list[float]:
    """``10,4,40,30`` as numbers."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != 4:
        raise GranaryError(f"--box {text}: give left,top,right,bottom in pixels")
    return found


if __name__ == "__main__":
    main()
