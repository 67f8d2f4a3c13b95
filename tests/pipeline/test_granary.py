"""The command ``granary`` from text to a scored SAE, in the checkout; tests/release has the installed wheel."""

import re
import shlex
from pathlib import Path

import pytest

from tests.cli import ForkServer


def suggested(text: str, start: str) -> list[str]:
    """The arguments of the command in `text` that begins with `start`."""
    found = re.search(rf"{re.escape(start)}.*", text)
    assert found is not None, text
    return shlex.split(found[0])


@pytest.mark.slow
def test_each_stage_suggests_the_next_as_it_was_started(stages: ForkServer, tmp_path: Path) -> None:
    here = stages.at(tmp_path)
    done = here.run("granary", "harvest", "debug=tiny_harvest", "corpus.contexts=64", "run_dir='a b'")
    assert done.code == 0, done.stderr
    train = suggested(done.stderr, "python -m granary train")
    assert train[4:] == ['run_dir="a b"']
    done = here.run(*train[2:], "debug=tiny_train", "schedule.tokens=2_000", "device=cpu")
    assert done.code == 0, done.stderr
    evaluate = suggested(done.stderr, "python -m granary eval")
    done = here.run(*evaluate[2:], "contexts=1", "downstream=false")
    assert done.code == 0, done.stderr
    assert "from granary import load; sae = load('a b/sae')" in done.stderr
    assert (tmp_path / "a b" / "report.html").is_file()
    done = here.run("granary", "inspect", "a b", "contexts=2")
    assert done.code == 0, done.stderr
    find = suggested(done.stderr, "python -m granary inspect find")
    done = here.run(*find[2:], "--split", "all")
    assert done.code == 0, done.stderr
    assert "closing" in done.stdout
    done = here.run("granary", "convert", "a b/sae", "theirs", "--to", "saelens")
    assert done.stdout == "theirs: granary to saelens\n"
    refused = here.run("granary", "eval", "sae=theirs", "run_dir='a b'").error
    assert refused.endswith("convert it first, python -m granary convert theirs NEW --to granary")
    assert here.run("granary", "store", "verify", "a b/store").code == 0
