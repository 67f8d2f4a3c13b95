"""The command line of ``granary``: what it shows, what it refuses, what a sweep makes of its arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from granary import __main__, __version__, sweep
from granary.neighbours import COMMON
from shared.basics.errors import GranaryError
from shared.launch.commands import COMMANDS


def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """``python -m granary arguments...``, to its end."""
    return subprocess.run([sys.executable, "-m", "granary", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_fits_a_screen(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == __main__.usage()
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("theirs", ["{}/__init__.py", "{}.py"])
def test_another_package_of_our_name_is_one_line(tmp_path: Path, name: str, theirs: str) -> None:
    file = tmp_path / theirs.format(name)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])}
    for script in (
        "import granary.__main__",
        "import granary\ntry: granary.SAE\nexcept ImportError as e: exit(f'{e}')",
    ):
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode != 0
        assert f"Python finds another {name!r} before Granary's own: {file}:" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_ours_are_found(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()  # a folder that is no package: Python takes it where there is no other
    assert subprocess.run([sys.executable, "-m", "granary", "--version"], cwd=tmp_path).returncode == 0


def test_version() -> None:
    assert call("--version").stdout == f"granary {__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train or trace?"),
        ("qqq", "choose from harvest, train, eval, inspect, explain, explore, trace, sweep, transcoders"),
    ],
)
def test_an_unknown_command_is_one_line(name: str, hint: str) -> None:
    done = call(name, "sae.k=8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: granary has no command '{name}': {hint}")
    assert len(done.stderr.splitlines()) == 1


def test_before_a_command_is_known_nothing_heavy_is_loaded() -> None:
    script = "import sys, granary.__main__; print([n for n in ('torch', 'hydra', 'numpy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"


def test_a_sweep_trains_what_it_is_given_and_scores_what_it_trained() -> None:
    given = ["name=mine", "sae.k=8,16", "nproc=2", "store.url=s3://bucket/x", "optim.lr=1e-3", "hydra/launcher=slurm"]
    train, evaluate = sweep.commands(["-m", *given])
    assert train == ["-m", *given]
    shared = ["name=mine", "nproc=2", "store.url=s3://bucket/x", "hydra/launcher=slurm"]
    assert evaluate == [*shared, "sae.path='${run_dir}/sweep'", "sae.last_grid=true"]


def test_a_sweep_of_nothing_is_that_of_the_makefile() -> None:
    train, _ = sweep.commands(["name=mine", "variant.x=[1,2]"])
    assert train == ["-m", "sae.k=8,16", "sae.expansion=4,8", "name=mine", "variant.x=[1,2]"]


@pytest.mark.parametrize("several", ["store.url=a,b", "name=one,two", "nproc=choice(1,2)"])
def test_what_training_and_evaluation_share_is_one_value(several: str) -> None:
    key = re.escape(several.partition("=")[0])
    with pytest.raises(GranaryError, match=rf"{key}=.* with one {key}: run the command once for each"):
        sweep.commands([several, "sae.k=8,16"])


def test_a_sweep_into_another_folder_is_scored_there() -> None:
    assert sweep.commands(["sae.k=1,2", "hydra.sweep.dir='a b'"])[1] == ["sae.path='a b'", "sae.last_grid=true"]
