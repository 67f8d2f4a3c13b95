"""Which SAEs are meant, and whether they fit the store and the model; wrong inputs are told before anything runs."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shared.basics.errors import GranaryError
from shared.sae.finding import expand
from shared.sae.for_store import DictionaryFolder, open_folder
from shared.store import Store
from stage_eval.config import SAEInput
from stage_eval.grid import is_of_grid, last_grid
from stage_eval.measure.session import Loaded
from stage_eval.results.comparison import LeftOut


@dataclass(frozen=True)
class SAEFolder(DictionaryFolder):
    """One dictionary to evaluate."""

    name: str = ""
    """How tables and reports call it."""

    def loaded(self, device: torch.device) -> Loaded:
        """The dictionary on `device`, weights without gradient."""
        return Loaded(self.spliced, self.sites, self.widths, self.load(device))

    @property
    def spliced(self) -> str:
        """Name of the condition in which it is spliced into the language model."""
        return f"sae {self.name}"


@dataclass(frozen=True)
class Found:
    """What a specification names: dictionaries that fit the store, and folders that can't be evaluated with the why."""

    folders: list[SAEFolder]
    left_out: list[LeftOut]


def find_saes(chosen: SAEInput, store: Store, hook: str | None) -> Found:
    """Find what is chosen (a path, glob, hub id or list of these), and check it against `store`.

    What is named itself must be sound. Of what a folder or a glob stands for, such as a sweep with a run that has not
    finished, the sound ones are taken and the others left out.

    Raises GranaryError for a path without SAEs, a hook that the store lacks, or a width that differs from the hook's.
    """
    paths: dict[str, bool] = {}  # in the order found; whether it was named itself
    for part in map(str, chosen.path if isinstance(chosen.path, list) else [chosen.path]):
        for path in of_last_grid(part, expand(part)) if chosen.last_grid else expand(part):
            paths[path] = paths.get(path, False) or path == part
    folders, left_out = [], []
    for path, is_named in paths.items():
        try:
            folders.append(SAEFolder(**vars(open_folder(path, store, hook))))
        except GranaryError as error:
            if is_named:
                raise
            left_out.append(LeftOut(path=path, reason=str(error)))
    if not folders:
        first = left_out[0]
        more = f" ({len(left_out)} folders, none of which can be evaluated)" if len(left_out) > 1 else ""
        raise GranaryError(f"{first.reason}{more}")
    names = short_names([folder.path for folder in folders])
    return Found([replace(one, name=name) for one, name in zip(folders, names, strict=True)], left_out)


def of_last_grid(sweep: str, paths: list[str]) -> list[str]:
    """Those of the paths whose runs the last sweep in the folder `sweep` trained, or began."""
    grid = last_grid(Path(sweep))
    kept = [path for path in paths if is_of_grid(Path(path), grid)]
    if not kept:
        raise GranaryError(f"none of the runs of the last sweep in {sweep} has begun: start it again")
    return kept


def short_names(paths: list[str]) -> list[str]:
    """The paths without what they share: sweep folders are called by their last part, a lone SAE by its last two."""
    parts = [Path(path).parts for path in paths]
    if len(paths) == 1:
        return ["/".join(parts[0][-2:]).lstrip("/")]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]
