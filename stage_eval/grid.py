"""Which folders of a sweep its last command trained: a sweep's folder keeps the runs of earlier grids too.

Hydra leaves two records: ``multirun.yaml`` in the sweep's folder, with the values that every key was given, and
``.hydra/overrides.yaml`` in each run's, with those of that run.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from shared.basics.documents import typed, typed_at
from shared.basics.errors import GranaryError
from shared.basics.yaml_file import read_yaml

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
    try:
        task = typed_at(read_yaml(record), "hydra.overrides.task", list[str], record)
        given = OverridesParser.create().parse_overrides(task)
    except (GranaryError, HydraException) as error:
        raise GranaryError(f"{record} does not say what the sweep was: leave out sae.last_grid") from error
    for override in given:
        key = override.get_key_element()
        values = (
            override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        )
        choices[key] = [f"{key}={value}" for value in values]
    return {frozenset(without_processes(run)) for run in itertools.product(*choices.values())}


def is_of_grid(folder: Path, grid: set[frozenset[str]]) -> bool:
    """Whether the run in `folder` is one of `grid`."""
    record = folder / RUN_RECORD
    try:
        return record.is_file() and frozenset(without_processes(typed(list[str], read_yaml(record), ""))) in grid
    except GranaryError:  # torn, or not Hydra's: no run of the sweep that can be told
        return False


def without_processes(overrides: Iterable[str]) -> list[str]:
    """The overrides but that of nproc, which the ranks of a run are not given."""
    return [override for override in overrides if not override.startswith("nproc=")]
