"""The law of latents and tokens that benchmarks/wide.py fits: a planted one is found again, and foretells."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_a_planted_law_is_found_and_foretells() -> None:
    command = [sys.executable, "-c", ASK.format(folder=str(BENCHMARKS))]
    said = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.splitlines()
    for line in said[:2]:
        planted, found, wanted, foretold = json.loads(line)
        assert found == pytest.approx(planted, rel=0.01)
        assert foretold == pytest.approx(wanted, rel=0.005)
    assert len(said) == 4
    assert all("it takes five points" in line for line in said[2:])
