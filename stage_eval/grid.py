"""Which folders of a sweep its last command trained: a sweep's folder keeps the runs of earlier grids too.

Hydra leaves two records: ``multirun.yaml`` in the sweep's folder, with the values that every key was given, and
``.hydra/overrides.yaml`` in each run's, with those of that run.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from shared.basics.errors import GranaryError

SWEEP_RECORD, RUN_RECORD = "multirun.yaml", ".hydra/overrides.yaml"


def last_grid(folder: Path) -> set[frozenset[str]]:
    """The runs of the last sweep in `folder`, each as the overrides it was started with.

    Raises GranaryError for a folder that holds no sweep.
    """
    record = folder / SWEEP_RECORD
    if not record.is_file():
        raise GranaryError(
            f"{folder} has no {SWEEP_RECORD}, so it is not the folder of a sweep: leave out sae.last_grid"
        )
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(texts(OmegaConf.load(record).hydra.overrides.task)):
        key = override.get_key_element()
        values = (
            override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        )
        choices[key] = [f"{key}={value}" for value in values]
    return {frozenset(without_processes(run)) for run in itertools.product(*choices.values())}


def is_of_grid(folder: Path, grid: set[frozenset[str]]) -> bool:
    """Whether the run in `folder` is one of `grid`."""
    record = folder / RUN_RECORD
    return record.is_file() and frozenset(without_processes(texts(OmegaConf.load(record)))) in grid


def texts(recorded: Any) -> list[str]:
    """A list of overrides as they were given: what they refer to, such as ``${at_layer}``, is not looked up."""
    return [str(one) for one in OmegaConf.to_container(recorded, resolve=False)]


def without_processes(overrides: Iterable[str]) -> list[str]:
    """The overrides but that of nproc, which the ranks of a run are not given."""
    return [override for override in overrides if not override.startswith("nproc=")]
