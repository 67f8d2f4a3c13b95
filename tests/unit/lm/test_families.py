"""Packed documents of many families: right or refused, in sdpa and eager, never silently wrong (docs/families.md)."""

from pathlib import Path

import pytest
import transformers

from tests.cli import ForkServer

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "benchmarks" / "families.py"
PAGE = REPOSITORY / "docs" / "families.md"


def run(stages: ForkServer, *families: str) -> list[list[str]]:
    """The script's lines: family and cells."""
    done = stages.start(str(SCRIPT), *families).finish(timeout=1800)
    assert done.code == 0, done.stdout + done.stderr
    return [line.split(" | ") for line in done.stdout.splitlines() if " | " in line]


def verdicts(rows: list[list[str]]) -> dict[str, list[str]]:
    """Without the figures, which follow the processor."""
    return {name: [cell.split(",")[0] for cell in cells] for name, *cells in rows}


def documented() -> dict[str, list[str]]:
    lines = PAGE.read_text(encoding="utf-8").partition("|---|")[2].splitlines()[1:]
    return verdicts([line.strip("| ").split(" | ") for line in lines])


def check(found: dict[str, list[str]], wanted: dict[str, list[str]]) -> None:
    """The page is of the version of transformers that it names; a newer one may isolate what that one does not."""
    assert found.keys() == wanted.keys()
    if f"with transformers {'.'.join(transformers.__version__.split('.')[:2])}:" in PAGE.read_text(encoding="utf-8"):
        assert found == wanted
    for name, cells in found.items():
        for cell, documented_cell in zip(cells, wanted[name], strict=True):
            assert cell in {documented_cell, "right"}, name


def test_three_families(stages: ForkServer) -> None:
    found = verdicts(run(stages, "mistral", "llama4_text", "opt"))
    wanted = {
        "mistral": ["right"] * 4,
        "llama4_text": ["refused", "right"] * 2,
        "opt": ["right", "right", "refused", "right"],
    }
    check(found, wanted)
    assert {name: documented()[name] for name in wanted} == wanted


@pytest.mark.slow
def test_every_family_is_what_the_table_says(stages: ForkServer) -> None:
    found = verdicts(run(stages))
    assert len(found) >= 25
    check(found, documented())
