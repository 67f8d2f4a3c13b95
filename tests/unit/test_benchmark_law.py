"""The law of latents and tokens that benchmarks/wide.py fits: a planted one is found again, foretells, and is drawn."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli import environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ASK = """
import json, sys; sys.path.insert(0, {folder!r})
from law import fit
for a, b, q in ((0.5, 0.4, 1.0), (0.4, 0.5, 4.0)):
    planted = lambda F, T: ((2 * F**-a) ** q + (40 * T**-b) ** q) ** (1 / q)
    law = fit([(F, T, planted(F, T)) for F in (1024, 4096, 16384) for T in (5e5, 2e6, 8e6)])
    found = [law.latents, law.tokens, law.sharpness]
    print(json.dumps([[a, b, q], found, planted(65536, 3e7), law.at(65536, 3e7)]))
for points in ([(1, 1, 1)] * 4, [(1024, T, 0.1) for T in range(1, 9)]):
    try:
        fit(points)
    except ValueError as error:
        print(error)
"""
DRAW = """
import sys; sys.path.insert(0, {folder!r})
from pathlib import Path
from matplotlib import rc_context
from law import draw, fit
points = [(F, T, F**-0.5 + T**-0.3) for F in (1024, 4096, 16384) for T in (5e5, 2e6, 8e6)]
few = points[:2] + points[3:5] + points[6:7]
with rc_context({{"svg.fonttype": "none"}}):
    draw({{"ours": (points, fit(points)), "theirs": (few, fit(few))}}, "a model, k 32", Path({path!r}))
"""


def test_a_planted_law_is_found_and_foretells() -> None:
    command = [sys.executable, "-c", ASK.format(folder=str(BENCHMARKS))]
    said = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.splitlines()
    for line in said[:2]:
        planted, found, wanted, foretold = json.loads(line)
        assert found == pytest.approx(planted, rel=0.01)
        assert foretold == pytest.approx(wanted, rel=0.005)
    assert len(said) == 4
    assert all("it takes five points" in line for line in said[2:])


def test_the_figure_has_a_panel_per_trainer_and_names_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "images" / "law.svg"
    command = [sys.executable, "-W", "error", "-c", DRAW.format(folder=str(BENCHMARKS), path=str(path))]
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    texts = [text for element in ElementTree.parse(path).iter() if (text := (element.text or "").strip())]
    assert {"a model, k 32", "ours", "theirs", "latents F", "held-out FVU, by training tokens"} <= set(texts)
    assert [texts.count(f"{tokens} M") for tokens in ("0.5", "2", "8")] == [2, 2, 1]


def test_the_page_tells_the_law_of_the_recorded_rows(tmp_path: Path) -> None:
    command = [sys.executable, "wide.py", "--law", "--recorded", "--model", "bundled"]
    command += ["--figure", str(tmp_path / "law.png")]
    done = subprocess.run(command, cwd=BENCHMARKS, env=environment(), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])["bundled"]["law"]
    page = (BENCHMARKS.parent / "docs" / "other_trainers.md").read_text()
    for law in (told["granary"], told["sparsify"]):
        powers, error = re.findall(r"[FT]\^-[\d.]+", law), law.split()[-1].replace("%", " %")
        assert len(powers) == 2
        assert all(power in page for power in powers)
        assert error in page
    assert (tmp_path / "law_bundled.png").exists()
