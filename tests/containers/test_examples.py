"""Dockerfile, Kubernetes objects and SkyPilot task: read by the tools of each, and their commands by the stages.

The tools are in an environment of their own (``make test-containers``); nothing here starts a container.
"""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module

import stage_harvest.config
import stage_train.config
from shared.launch.overrides import expand_shorthands
from tests.cli import REPOSITORY

TOOLS = REPOSITORY / ".venv-clusters" / "bin"
DOCKERFILE = REPOSITORY / "Dockerfile"
KUBERNETES = REPOSITORY / "examples/clusters/kubernetes.yaml"
SKYPILOT = REPOSITORY / "examples/clusters/skypilot.yaml"
needs_tools = pytest.mark.skipif(
    not (TOOLS / ".." / ".installed").exists(), reason="make test-containers installs them"
)


def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERNETES.read_text()))


def jobs() -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Each Job's specification, and its command: after the image's entry point where it does not set its own."""
    for one in objects():
        if one["kind"] == "Job":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            yield one["spec"], [*container.get("command", ["granary"]), *container["args"]]


def skypilot_commands() -> Iterator[list[str]]:
    script = yaml.safe_load(SKYPILOT.read_text())["run"].replace("\\\n", "")
    for line in map(str.strip, script.splitlines()):
        if line.startswith(("python ", "granary ")):
            yield shlex.split(re.sub(r'"\$[^"]*"', "8", line))


def stage_and_overrides(command: list[str]) -> tuple[str, list[str]]:
    at = next(n for n, word in enumerate(command) if re.fullmatch(r"stage_\w+|sweep", word))
    return {"stage_harvest": "harvest", "sweep": "train"}[command[at]], command[at + 1 :]


@pytest.mark.parametrize(
    "command", [*(command for _, command in jobs()), *skypilot_commands()], ids=lambda command: command[0]
)
def test_the_keys_are_those_of_the_stages(command: list[str]) -> None:
    stage, overrides = stage_and_overrides(command)
    stage_harvest.config.register()
    stage_train.config.register()
    known = [one for one in expand_shorthands(overrides) if not one.startswith("nproc=")]
    assert known
    with initialize_config_module("conf", version_base="1.3"):
        for number in range(2):  # a sweep's first values, and its last
            one_run = [re.sub(r"=(\d+),(\d+)$", rf"=\{number + 1}", override) for override in known]
            assert compose(stage, overrides=one_run).name == "llama31"


def test_both_start_as_many_ranks_as_they_have_gpus() -> None:
    for spec, command in jobs():
        (container,) = spec["template"]["spec"]["containers"]
        ranks = next(re.fullmatch(r"(?:--nproc-per-node|nproc)=(\d+)", word) for word in command if "nproc" in word)
        assert ranks is not None
        assert int(ranks[1]) == container["resources"]["limits"]["nvidia.com/gpu"]
        if "completions" in spec:
            assert f"--nnodes={spec['completions']}" in command


def test_the_image_holds_what_the_package_is_built_from() -> None:
    copied = set(re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), re.MULTILINE))
    names = {name for line in copied for name in line.split()[:-1]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {one.rstrip("*") for one in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert names == packages | {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE.read_text())
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


@needs_tools
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    done = subprocess.run([TOOLS / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_tools
@pytest.mark.slow
def test_the_kubernetes_objects_are_those_of_its_api(tmp_path: Path) -> None:
    assert [one["kind"] for one in objects()] == ["PersistentVolumeClaim", "Service", "Job", "Job"]
    check = [TOOLS / "kubernetes-validate", "--strict", "-k", "1.33"]
    done = subprocess.run([*check, KUBERNETES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(KUBERNETES.read_text().replace("podReplacementPolicy", "podReplacementPlan"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode != 0


@needs_tools
@pytest.mark.slow
def test_skypilot_reads_its_task(tmp_path: Path) -> None:
    code = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.resources)"
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [TOOLS / "python", "-c", code, SKYPILOT], capture_output=True, text=True, env=environment, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 "), done.stdout
    assert "H100" in done.stdout
