"""``granary explore``: it serves until Ctrl-C, writes files, and tells in a line what is wrong."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import pytest

from shared.basics.pages_link import slot
from stage_inspect.explorer.__main__ import main
from tests.cli import ForkServer, environment
from tests.exploring import Client
from tests.latents import synthetic_latents
from tests.planted import planted_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    synthetic_latents(folder / "latents", 30)
    return folder


def test_it_serves_until_it_is_interrupted(study: Path, stages: ForkServer) -> None:
    process = stages.start("stage_inspect.explorer", str(study), "--port", "0", "--no-model")
    try:
        wait(lambda: process.output.endswith("\n") or process.poll() is not None)
        told = process.output
        assert told.startswith(f"{study.name}: http://127.0.0.1:"), process.errors
        url = told.split()[1]
        with urlopen(f"{url}data/meta.json", timeout=60) as answer:
            assert json.load(answer)["d_latent"] == 30
        process.send_signal(signal.SIGINT)
        done = process.finish(timeout=60)
    finally:
        process.kill()
    assert (done.stdout, done.stderr) == (told, "")
    assert done.code in (0, 130)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_search_ends_with_the_server(tmp_path: Path, sent: signal.Signals) -> None:
    """Also one that hangs in a regular expression, and under a server that can't end anything any more."""
    planted_study(tmp_path)
    command = [sys.executable, "-m", "stage_inspect.explorer", str(tmp_path), "--port", "0", "--no-model"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout is not None
        client = Client(int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0]))
        client.post("/api/find", {"regex": [r"((?:.|\n)+)+\x00"]})
        wait(lambda: client.get("/api/find").json()["total"] is not None)
        children = [
            int(pid)
            for file in Path(f"/proc/{process.pid}/task").glob("*/children")
            for pid in file.read_text().split()
        ]
        assert len(children) == 2  # the search, and what multiprocessing itself starts
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        wait(lambda: not any(map(is_alive, children)))
    finally:
        process.kill()
        process.communicate()
    assert errors == "" or sent is signal.SIGKILL


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_it_writes_files(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--folder", tmp_path / "site", "--html", tmp_path / "a.html", "--latents", "1,5")
    main([str(study / "latents"), *map(str, files)])
    told = capsys.readouterr().out
    assert "30 latents in" in told
    assert "2 latents in" in told
    assert (tmp_path / "site" / "data" / "meta.json").is_file()
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_reports_lead_to_the_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_latents(tmp_path / "latents", 9)
    (tmp_path / "report.html").write_text(f"<p>{slot('.')}</p>")
    main([str(tmp_path), "--html"])
    assert 'href="latents.html"' in (tmp_path / "report.html").read_text()
    main([str(tmp_path), "--folder"])
    assert 'href="explorer/index.html"' in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "explorer") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{study}/nowhere"], "no latents folder at"),
        (["{study}", "--html", "{study}/x.html", "--latents", "1,b"], "give numbers separated by commas"),
        (["{study}", "--html", "{study}/x.html", "--latents", "30"], "the latents are 0 to 29"),
        (["{study}", "--folder", "{study}"], "holds other files"),
        (["{study}", "--dictionary", "/nowhere"], "the dictionary was at /nowhere"),
        (["{study}", "--no-model", "--port", "99999"], "port 99999 can't be had: choose another with --port"),
    ],
)
def test_what_is_wrong_is_one_line(
    study: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([argument.format(study=study) for argument in arguments])
    output, errors = capsys.readouterr()
    assert ended.value.code == 2
    assert errors.startswith("error: ")
    assert told in errors
    assert (output, len(errors.splitlines())) == ("", 1)
    assert {path.name for path in study.iterdir()} == {"latents"}
