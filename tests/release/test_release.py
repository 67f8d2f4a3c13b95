"""What is published: a source distribution that holds the repository, and a wheel made from it that works elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.cli import REPOSITORY

pytestmark = pytest.mark.release
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PACKAGES = ("conf", "granary", "shared", "stage_eval", "stage_harvest", "stage_inspect", "stage_trace", "stage_train")


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (REPOSITORY / name).exists()}


def checked(command: list[str | Path], folder: Path) -> str:
    """What a command said on stderr; fails the test unless it succeeds."""
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from nothing but what git tracks; the wheel from the source distribution."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    checked([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder], source)
    return folder


@pytest.fixture(scope="module")
def unpacked(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def test_both_are_named_after_the_version_and_pass_the_check(dist: Path) -> None:
    stem = f"granary_sae-{PROJECT['version']}"
    assert sorted(path.name for path in dist.iterdir()) == [f"{stem}-py3-none-any.whl", f"{stem}.tar.gz"]
    checked([sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()], dist)
    cited = re.search(r"^version: (.*)$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1].strip('"') == PROJECT["version"]


def test_the_source_distribution_holds_the_repository(unpacked: Path) -> None:
    there = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in there if name in ("PKG-INFO", "setup.cfg") or name.startswith("granary_sae.egg-info/")}
    assert there - made == tracked()


def test_tests_run_from_the_source_distribution(unpacked: Path) -> None:
    tests = ["tests/unit/docs", "tests/unit/basics", "tests/unit/test_old_formats.py"]
    checked([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], unpacked)


def test_the_wheel_holds_the_packages_and_their_files_alone(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        there = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert there == {name for name in tracked() if name.startswith(tuple(f"{package}/" for package in PACKAGES))}


def test_the_wheel_in_an_empty_environment_does_the_demo_in_another_folder(dist: Path, tmp_path: Path) -> None:
    """Its dependencies come from the registry; ``conf`` and ``shared`` in the folder must not be taken for ours."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
    checked([*pip, "-c", REPOSITORY / "constraints.txt", next(dist.glob("*.whl"))], tmp_path)
    work = tmp_path / "work"
    for name in ("conf", "shared"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    granary = python.with_name("granary")
    assert "granary train run_dir=runs/debug" in checked([granary, "harvest", "debug=tiny_harvest"], work)
    checked([granary, "sweep", "debug=tiny_train", "name=debug", "sae.k=4,8", "packed=true", "nproc=2"], work)
    assert "granary eval name=debug" in checked([granary, "train", "debug=tiny_train", "nproc=2"], work)
    assert "load('runs/debug/sae')" in checked([granary, "eval", "debug=tiny_eval"], work)
    checked([granary, "inspect", "name=debug", "contexts=2"], work)
    read = "load('runs/debug/sae'); Latents.open('runs/debug/latents').top(7, 1)"
    # Where Python itself would take the folder's ``shared``, Granary refuses to begin: -P leaves the folder out.
    checked([python, "-P", "-c", f"from granary import Latents, load; {read}"], work)
    assert (work / "runs/debug/report.html").is_file()
