"""``granary explore`` as a process: it serves, ends on Ctrl-C, writes files, and tells in a line what is wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.cli import environment
from tests.latents import synthetic_latents


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    synthetic_latents(folder / "latents", 30)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stage_inspect.explorer", *map(str, arguments)]


def test_it_serves_until_it_is_interrupted(study: Path) -> None:
    process = subprocess.Popen(
        command(study, "--port", 0), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told.startswith("without the pages that run the model: the dictionary was at")
        told = process.stdout.readline()
        assert told.startswith(f"{study.name}: http://127.0.0.1:")
        url = told.split()[1]
        with urlopen(f"{url}data/meta.json", timeout=60) as answer:
            assert json.load(answer)["d_latent"] == 30
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (output, errors) == ("", "")
    assert process.returncode in (0, 130)


def test_it_writes_files(study: Path, tmp_path: Path) -> None:
    wanted = command(
        study / "latents", "--folder", tmp_path / "site", "--html", tmp_path / "a.html", "--latents", "1,5"
    )
    done = subprocess.run(wanted, capture_output=True, text=True, env=environment(), check=True)
    assert "30 latents in" in done.stdout
    assert "2 latents in" in done.stdout
    assert (tmp_path / "site" / "data" / "meta.json").is_file()
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "no latents folder at nowhere"),
        (["{study}", "--html", "x.html", "--latents", "1,b"], "give numbers separated by commas"),
        (["{study}", "--html", "x.html", "--latents", "30"], "the latents are 0 to 29"),
        (["{study}", "--dictionary", "/nowhere"], "the dictionary was at /nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(study: Path, tmp_path: Path, arguments: list[str], told: str) -> None:
    wanted = command(*(argument.format(study=study) for argument in arguments))
    done = subprocess.run(wanted, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
