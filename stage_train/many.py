"""Many SAEs from one pass over a store: gather the runs of a sweep, then train them in one process group.

    python -m stage_train -m packed=true sae.k=32,64 sae.expansion=8,32

writes the resolved configurations of its runs to ``packed.yaml`` in the sweep's folder, and starts

    python -m stage_train.packed runs/demo/sweep/packed.yaml

on nproc processes. A list that is no grid, or several machines, take the second form by hand, under torchrun. Imports
nothing heavy until then.
"""

import argparse
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shared.basics.display import masked
from shared.basics.errors import GranaryError
from shared.basics.files import write_text
from shared.basics.run_folder import RunFolder
from shared.basics.yaml_file import read_yaml
from shared.launch import commands
from shared.launch.config_errors import describe_config_error
from shared.launch.orphans import end_with_starter
from shared.launch.outcome import ending_in_one_line
from shared.launch.schema import fill
from shared.launch.stage import python_module, run_child
from shared.launch.terminal import LogFile, ShownFormatter
from stage_train.config import TrainSchema, as_dict

_gathered: dict[Path, list[TrainSchema]] = {}
"""Runs noted so far, by the folder of their sweep."""

# What the processes of a packed job are given beside the file: JSON, from each URL in it whose secrets are masked to
# the URL itself.
GRANTS = "GRANARY_GRANTS"


def gather(cfg: TrainSchema) -> None:
    """Take note of one run of a sweep. Raises GranaryError where there is no sweep to wait for."""
    job = HydraConfig.get()
    if job.mode is not RunMode.MULTIRUN or "RANK" in os.environ:
        raise GranaryError(
            "packed=true trains the runs of a sweep together, in processes that it starts: add -m, give nproc=N, and "
            "leave out torchrun and hydra/launcher=slurm"
        )
    _gathered.setdefault(Path(job.sweep.dir), []).append(cfg)


def train_gathered() -> None:
    """Train what was noted, if anything was, in a child process or several."""
    for folder, cfgs in _gathered.items():
        path = RunFolder(folder).packed_list
        write_text(path, OmegaConf.to_yaml(OmegaConf.create([as_dict(cfg) for cfg in cfgs])))
        os.environ[GRANTS] = json.dumps(
            dict(grants([OmegaConf.to_container(OmegaConf.structured(cfg)) for cfg in cfgs]))
        )
        run_child([*python_module(cfgs[0].nproc), "stage_train.packed", str(path)])


def grants(value: Any) -> Iterator[tuple[str, str]]:
    """(as it may be saved, as it was given) of every text in a configuration that holds a secret."""
    if isinstance(value, str) and masked(value) != value:
        yield masked(value), value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from grants(item)


def granted(value: Any, given: Mapping[str, str]) -> Any:
    """A configuration from a file, with the texts of `given` in place of masked ones."""
    if isinstance(value, dict):
        return {key: granted(item, given) for key, item in value.items()}
    if isinstance(value, list):
        return [granted(item, given) for item in value]
    return given.get(value, value) if isinstance(value, str) else value


def read_list(path: Path) -> list[TrainSchema]:
    """The configurations in a file: a YAML list whose entries are as ``train.yaml`` in a run's folder.

    Raises GranaryError for a file that is missing or not such a list, and for a wrong key or value in it.
    """
    if not path.is_file():
        raise GranaryError(f"{path} is not there: give the packed.yaml of a sweep, or a list of train.yaml contents")
    entries = granted(read_yaml(path), json.loads(os.environ.get(GRANTS, "{}")))
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise GranaryError(f"{path} is not a list of configurations: begin each with '- ' and the keys of a train.yaml")
    try:
        return [fill(OmegaConf.merge(OmegaConf.structured(TrainSchema), entry)) for entry in entries]
    except (ValueError, TypeError, OmegaConfBaseException) as error:
        raise GranaryError(f"{path}: {describe_config_error(error)}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m stage_train.packed FILE``."""
    parser = argparse.ArgumentParser(
        prog=commands.program("packed"), description="Train the SAEs that a file lists from one pass over a store."
    )
    parser.add_argument("file", type=Path, help="packed.yaml of a sweep with packed=true")
    path: Path = parser.parse_args(arguments).file
    end_with_starter()
    with ending_in_one_line(on_interrupt=None):  # the command that the user gave says what to do
        cfgs = read_list(path)
        _log_to(path.with_suffix(".log"))
        from stage_train.job import train

        train(cfgs)


def _log_to(file: Path) -> None:
    """One line per event on stderr, the same with times in `file`; warnings alone on secondary ranks."""
    rank = os.environ.get("RANK", "0")
    console = logging.StreamHandler()
    if rank != "0":
        console.setFormatter(ShownFormatter(f"rank {rank}: %(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[console])
        return
    console.setFormatter(ShownFormatter("%(message)s"))
    timed = LogFile(str(file))
    timed.setFormatter(ShownFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console, timed])


if __name__ == "__main__":
    main()
