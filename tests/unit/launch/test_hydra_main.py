"""Hydra's parser is built on each Python."""

import argparse
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser

from shared.launch.hydra_main import any_help_accepted

add_argument = argparse.ArgumentParser.add_argument


def add_and_check(parser: argparse.ArgumentParser, *names: str, **settings: Any) -> argparse.Action:
    """As from Python 3.14 on, where help is looked at once it is given."""
    action = add_argument(parser, *names, **settings)
    parser._check_help(action)  # type: ignore[attr-defined]
    return action


def check(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    if not isinstance(action.help, str):  # as Hydra's of shell completion
        raise ValueError("badly formed help string")


def test_help_that_is_no_string_is_accepted_where_hydra_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_and_check)
    monkeypatch.setattr(argparse.ArgumentParser, "_check_help", check, raising=False)
    with pytest.raises(ValueError, match="badly formed"):
        get_args_parser()
    with any_help_accepted():
        parser = get_args_parser()
    assert parser.parse_args(["-m", "k=1"]).multirun
    with pytest.raises(ValueError, match="badly formed"):
        get_args_parser()
