"""Links from a report to the pages of its latents, which another stage writes, earlier or later.

A report holds a slot for each of its dictionaries: a pair of HTML comments that name the folder of the run. Whoever has
written a report or pages fills the slots of the reports there are; a slot whose run has no pages is empty.
"""

import re
from pathlib import Path
from urllib.parse import quote, unquote

from shared.basics.files import write_bytes
from shared.basics.run_folder import RunFolder

SLOT = re.compile(r"<!--pages of ([\w./~%-]+)-->.*?<!--end of pages-->")
ABOVE = 4  # folders above a run in which a comparison may name it


def slot(folder: str) -> str:
    """An empty slot for the run in `folder`, relative to the report."""
    return f"<!--pages of {quote(folder)}--><!--end of pages-->"


def link_pages(report: Path) -> None:
    """Fill the slots of a report; one that there is not, or that has none, is left as it is."""
    if not report.is_file():
        return
    before = report.read_text(encoding="utf-8")
    after = SLOT.sub(lambda found: _filled(found[1], report.parent), before)
    if after != before:
        write_bytes(report, after.encode())


def reports_of(run: Path) -> list[Path]:
    """Reports that may have a slot for this run: its own, and comparisons beside it and above."""
    above = [run, *run.resolve().parents[:ABOVE]]
    return [RunFolder(run).report, *(RunFolder(folder).comparison_page for folder in above)]


def _filled(name: str, beside: Path) -> str:
    run = RunFolder(Path(unquote(name)))
    places = (run.pages / "index.html", run.pages_file)
    link = next((place for place in places if (beside / place).is_file()), None)
    shown = f'<a href="{quote(link.as_posix())}">What its latents do</a>' if link is not None else ""
    return f"<!--pages of {name}-->{shown}<!--end of pages-->"
