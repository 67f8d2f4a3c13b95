"""Commands that are suggested can be pasted into a shell, whatever the values hold, in the form that was used."""

import importlib.util
import os
import shlex
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from shared.launch import commands


def read_back(command: str) -> tuple[list[str], dict[str, object]]:
    """The words before the first override as a shell splits them, and the overrides as Hydra understands them."""
    words = shlex.split(command)
    given = [word for word in words if "=" in word]
    cfg = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(given):
        assert not override.is_sweep_override()
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return words[: len(words) - len(given)], dict(cfg)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["Cc", "Cs"])))
def test_any_text_survives_the_shell_and_hydra(value: str) -> None:
    command = commands.line("eval", commands.override("path", value))
    assert read_back(command) == (["python", "-m", "stage_eval"], {"path": value})


@pytest.mark.parametrize(
    "value",
    [
        "null",
        "True",
        "1",
        "1e5",
        "nan",
        "a,b",
        "sae.k=8,x=1",
        "it's",
        'a"b',
        "a\\",
        'a\\"',
        "${run_dir}",
        "[a]",
        "*",
        "",
    ],
)
def test_what_would_be_read_as_something_else_is_quoted(value: str) -> None:
    assert read_back(commands.line("eval", commands.override("path", value)))[1] == {"path": value}


@pytest.mark.parametrize("value", ["runs/demo", "s3://bucket/a-b_c", "/tmp/x.y", "sae"])
def test_plain_values_stay_as_they_are(value: str) -> None:
    assert commands.line("train", commands.override("path", value)) == f"python -m stage_train path={value}"


def test_the_form_is_that_in_which_the_program_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands.line("convert", "my sae", "NEW") == "python -m shared.sae convert 'my sae' NEW"
    for argv0, form in (("/usr/bin/granary", "granary"), ("/site-packages/granary/__main__.py", "python -m granary")):
        monkeypatch.setenv(commands.PROGRAM, commands.started_by(argv0))
        assert commands.line("convert", "my sae", "NEW") == f"{form} convert 'my sae' NEW"


@pytest.mark.parametrize("in_path", [True, False])
def test_children_find_modules_where_the_program_does(monkeypatch: pytest.MonkeyPatch, *, in_path: bool) -> None:
    monkeypatch.setattr(
        sys, "path", ["", *sys.path] if in_path else [one for one in sys.path if one not in ("", os.getcwd())]
    )
    commands.use_program("/usr/bin/granary")
    assert os.environ.get("PYTHONSAFEPATH") == (None if in_path else "1")
    assert os.environ[commands.PROGRAM] == "granary"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_its_module(name: str) -> None:
    spec = importlib.util.find_spec(commands.COMMANDS[name].module)
    assert spec is not None
    is_package = spec.submodule_search_locations is not None
    assert not is_package or importlib.util.find_spec(f"{spec.name}.__main__") is not None
