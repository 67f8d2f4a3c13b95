"""Which folders of dictionaries a path, a folder of folders or a glob names, in natural order."""

import glob
from pathlib import Path

from shared.basics.errors import GranaryError
from shared.basics.numbers import natural_key
from shared.basics.run_folder import CONFIG_FILE, WEIGHTS_FILE, RunFolder
from shared.launch import commands
from shared.sae.folder import is_own, locate
from shared.sae.formats import foreign


def expand(spec: str) -> list[str]:
    """Folders of one part of the specification, those of unfinished runs too; a hub id stands for itself."""
    if is_own(Path(spec)):
        return [spec]
    if Path(spec).is_dir():
        found = {str(path) for path in folders_below(Path(spec))}
        if not any(is_own(Path(path)) for path in found) and (name := foreign(Path(spec))) is not None:
            command = commands.line("convert", spec, "NEW", "--to", "granary")
            raise GranaryError(f"{spec} is an SAE in the {name} format: convert it first, {command}")
        if not found:
            raise GranaryError(f"no SAE in {spec}: an SAE folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        return sorted(found, key=natural_key)
    if glob.has_magic(spec):
        matches = [Path(path) for path in glob.glob(spec, recursive=True) if Path(path).is_dir()]
        found = {str(path) for match in matches for path in folders_below(match) or [match]}
        if not found:
            raise GranaryError(f"no SAE folder matches {spec}")
        return sorted(found, key=natural_key)
    locate(spec)
    return [spec]


def folders_below(folder: Path) -> set[Path]:
    """Those of `folder` and all in it that hold an SAE, or belong to a training run that has not exported its own."""
    begun = RunFolder(folder).train_config.name  # what a training run leaves as soon as it begins
    return {found.parent for mark in (WEIGHTS_FILE, begun) for found in folder.rglob(mark)}
