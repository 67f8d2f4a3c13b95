"""What feeds each latent and what it feeds, over a corpus: ``granary trace weights RUN...``."""

import argparse
import glob
import logging
from pathlib import Path

from shared.basics.run_folder import RunFolder
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line

WEIGHTS = """\
Virtual weights between the latents of different layers, through the residual stream, times how the two fire together
on a sample of a store: what feeds each latent and what it feeds, without any prompt. Written as a folder that
GlobalWeights.open reads, with a page.
"""


def main(argv: list[str] | None = None) -> None:
    """Make the folder; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog=f"{program('trace')} weights", description=WEIGHTS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="dictionaries, as granary trace takes them")
    parser.add_argument("--store", required=True, metavar="URL", help="of activations that hold what the latents read")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: weights, in the first RUN, or beside what a glob matches"
    )
    parser.add_argument("--tokens", type=int, default=131_072, help="of the sample, in whole contexts (131072)")
    parser.add_argument("--most", type=int, default=16, help="connections kept per latent and direction (16)")
    parser.add_argument("--model", metavar="PATH", help="the language model; default: what the store records")
    parser.add_argument("--latents", nargs="+", metavar="FOLDER", help="of granary inspect; default: as granary trace")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        from stage_trace.weights.job import make_weights

        logging.basicConfig(level=logging.INFO, format="%(message)s")
        lines = make_weights(
            arguments.runs,
            arguments.store,
            arguments.out or beside(Path(arguments.runs[0])),
            tokens=arguments.tokens,
            most=arguments.most,
            model_path=arguments.model,
            latents=arguments.latents,
            device_name=arguments.device,
        )
        print("\n".join(lines))  # noqa: T201


def beside(first: Path) -> Path:
    """Where the folder lies by itself: in the first RUN, or where the matches of a glob are."""
    while glob.has_magic(str(first)):
        first = first.parent
    return RunFolder(first).global_weights


if __name__ == "__main__":
    main()
