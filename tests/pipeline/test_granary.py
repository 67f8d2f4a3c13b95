"""The command ``granary`` from text to a scored SAE: in the checkout, and from an installed wheel elsewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.cli import REPOSITORY, ForkServer

# What a wheel is built from.
SOURCES = ("conf", "granary", "shared", "stage_eval", "stage_harvest", "stage_inspect", "stage_trace", "stage_train")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def suggested(text: str, start: str) -> list[str]:
    """The arguments of the command in `text` that begins with `start`."""
    found = re.search(rf"{re.escape(start)}.*", text)
    assert found is not None, text
    return shlex.split(found[0])


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


@pytest.mark.slow
def test_from_an_installed_wheel_in_another_folder(tmp_path: Path) -> None:
    """The folder has a ``conf`` and a ``shared`` of its own, which must not be taken for ours."""
    source, wheels, work = tmp_path / "source", tmp_path / "wheels", tmp_path / "work"
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip"]
    offline = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    build = [*pip, "wheel", *offline, "--no-build-isolation", str(source), "-w", str(wheels)]
    # Without PYTHONPATH, by which this process finds the checkout.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(build, env=environment, check=True)
    (wheel,) = wheels.glob("granary_sae-*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", *offline, str(wheel)], env=environment, check=True)
    # Torch and all the others, as they are here; this environment's own link to the checkout is not followed.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for folder in ("conf", "shared"):
        (work / folder).mkdir(parents=True)
        (work / folder / "__init__.py").write_text("raise RuntimeError('not this one')\n")

    def granary(*arguments: str) -> str:
        """Its messages; fails the test unless it succeeds."""
        command = [str(python.with_name("granary")), *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    harvested = granary("harvest", "debug=tiny_harvest", "tokenise_workers=2")
    assert "granary train run_dir=runs/debug" in harvested
    swept = granary("sweep", "debug=tiny_train", "name=debug", "sae.k=4,8", "packed=true", "nproc=2")
    assert "from granary import load; sae = load(" in swept
    assert (work / "runs/debug/eval/comparison.json").is_file() or list((work / "runs/debug").rglob("comparison.json"))
    trained = granary("train", "debug=tiny_train", "nproc=2")
    assert "granary eval name=debug" in trained
    assert "load('runs/debug/sae')" in granary("eval", "debug=tiny_eval")
    assert (work / "runs/debug/report.html").is_file()
