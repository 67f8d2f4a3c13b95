"""Hydra's entry, on every Python."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from omegaconf import DictConfig


def hydra_main(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Compose ``conf/<config_name>.yaml`` with the command line and call `task`; in a sweep once per job."""
    with any_help_accepted():
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name=config_name)(task)()


@contextmanager
def any_help_accepted() -> Iterator[None]:
    """Within it argparse takes help that is no string, as Hydra 1.3 gives it; from Python 3.14 on it else raises."""
    parser: Any = argparse.ArgumentParser
    check = getattr(parser, "_check_help", None)
    if check is None:
        yield
        return
    parser._check_help = lambda self, action: None
    try:
        yield
    finally:
        parser._check_help = check
