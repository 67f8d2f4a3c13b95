"""Find the latents of a concept: ``granary inspect find runs/demo --python all --regex 'self\\.'``."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from shared.basics.config import Split
from shared.basics.files import write_text
from shared.basics.run_folder import RunFolder
from shared.launch.commands import program
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownConsole
from stage_inspect.concepts.question import Question

if TYPE_CHECKING:
    from stage_inspect.concepts.search import Result

FIND = """\
Which latents stand for a concept. A concept is a regular expression, a set of tokens, spans that you marked (a JSON
Lines file), or one of Python source, whose truth comes from Python's own tokenizer. Every latent is ranked as a
detector of the concept's tokens, by F1 at its best threshold on one half of the documents; the scores, with 95 %
intervals over documents, are those on the other half. One pass over the store; the result is kept in the notes.
"""


def main(argv: list[str] | None = None) -> None:
    """Run the search; a wrong input is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog=f"{program('inspect')} find", description=FIND, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a latents folder (or its URL)")
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME", help="concepts of Python, or all")
    parser.add_argument("--regex", nargs="+", default=[], metavar="RE", help="regular expressions")
    parser.add_argument("--token", nargs="+", default=[], metavar="TEXT", help="texts of single tokens")
    parser.add_argument("--spans", type=Path, metavar="FILE", help="spans with labels, see docs/inspection.md")
    parser.add_argument("--split", choices=[split.value for split in Split], default="heldout", help="of the store")
    parser.add_argument("--contexts", type=int, help="so many of them, evenly spaced; default: all")
    parser.add_argument("--count", type=int, default=5, help="latents listed for each concept (5)")
    parser.add_argument("--sae", metavar="FOLDER", help="the dictionary, where it has moved")
    parser.add_argument("--store", metavar="URL", help="the store, where it has moved")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    arguments = parser.parse_args(argv)
    with ending_in_one_line():
        find(arguments)


def latents_url(run: str) -> str:
    """A latents folder as it is, a run by its folder or its name as the folder within it."""
    inside = RunFolder(Path(run)).latents
    named = RunFolder(Path("runs") / run).latents
    if "://" not in run and not os.path.exists(os.path.join(run, "meta.json")):
        if inside.is_dir():
            return str(inside)
        if named.is_dir():
            return str(named)
    return run


def find(arguments: argparse.Namespace) -> None:
    """Search, show and keep; raises GranaryError for every wrong input before the pass."""
    from tqdm import tqdm

    from stage_inspect.concepts.finding import Finding, records

    question = Question(
        python=arguments.python,
        regex=arguments.regex,
        token=arguments.token,
        spans=arguments.spans,
        split=Split(arguments.split),
        contexts=arguments.contexts,
        count=arguments.count,
    )
    finding = Finding(latents_url(arguments.run), arguments.sae, arguments.store, question)
    with tqdm(total=finding.tokens, unit="tok", unit_scale=True, desc="find") as bar:
        found = finding.run(bar.update)
    show(found, f"{arguments.split} tokens of {finding.store_url}")
    finding.keep(found)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(records(found), indent=1) + "\n")


def show(found: "Result", tokens: str) -> None:
    """Print the latents of each concept as a table; `tokens` says among which they were looked for."""
    from rich.table import Table

    title = f"{tokens}: chosen on {found.documents[0]:,} documents, scored on {found.documents[1]:,} others"
    table = Table(title=title, title_justify="left")
    table.add_column("concept")
    for name in ("latent", "F1", "95 %", "F1 chosen", "prec.", "recall", "AUROC", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, matches in found.matches.items():
        for number, one in enumerate(matches):
            table.add_row(
                name if not number else "",
                str(one.latent),
                f"{one.f1:.3f}",
                f"{one.low:.2f}-{one.high:.2f}",
                f"{one.chosen_f1:.3f}",
                f"{one.precision:.3f}",
                f"{one.recall:.3f}",
                f"{one.auroc:.3f}",
                f"{one.auroc_low:.2f}-{one.auroc_high:.2f}",
            )
    console = ShownConsole(soft_wrap=True)
    # A narrow terminal breaks lines; the table itself would leave out the concepts, the column that may shrink.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1 << 10)).maximum)
    console.print(table)
    for name, why in found.left_out.items():
        console.print(f"left out: {name}, {why}", markup=False)


if __name__ == "__main__":
    main()
