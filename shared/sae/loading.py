"""Loading a dictionary of any kind and of any project's format, and converting between formats."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from shared.basics.disk import telling_disk_errors
from shared.basics.errors import GranaryError
from shared.basics.files import making_folder
from shared.sae import folder as on_disk
from shared.sae.config import DictionaryConfig
from shared.sae.formats import FORMATS, WRITABLE, foreign
from shared.sae.formats import load as load_foreign
from shared.sae.formats import save as save_foreign
from shared.sae.sites import Sites
from shared.sae.variants import VARIANTS, Dictionary

GRANARY = "granary"
BY_KIND = {kind: made.config_class for kind, made in VARIANTS.items()}
KINDS = [*BY_KIND.values()]
Change = Callable[[str, Dictionary, dict[str, Any]], tuple[Dictionary, dict[str, Any]]]
"""From where a dictionary lies, itself and its provenance to another with its own."""


def load(path_or_hub_id: str | Path, *, device: str | torch.device = "cpu", verify: bool | None = None) -> Dictionary:
    """A dictionary of any kind, from a local folder or a hub repository (owner/name, hf://owner/name/folder).

    Reads every format of ``shared.sae.formats``. `verify`: compare every tensor with its digest in ``config.json``;
    None: where that takes less than a second. Raises GranaryError when the folder is missing, torn, damaged, or of a
    format that is not known.
    """
    config, tensors = on_disk.read_weights(on_disk.locate(path_or_hub_id), KINDS, device, verify=verify)
    return VARIANTS[config.kind].from_tensors(config, tensors, str(path_or_hub_id))


def is_intact(folder: Path) -> bool:
    """Whether a folder of this project's format loads, every tensor as its digest says."""
    try:
        load(folder, verify=True)
    except GranaryError:
        return False
    return on_disk.is_own(folder)


def load_config(folder: str | Path) -> DictionaryConfig:
    """The config of a saved dictionary, without reading its weights."""
    return on_disk.describe(Path(folder)).config(KINDS)


def detect(folder: Path) -> str:
    """Name of the format of `folder`, from its files alone; raises GranaryError where none fits."""
    name = GRANARY if on_disk.is_own(folder) else foreign(folder)
    if name is None:
        raise GranaryError(f"{folder} is not an SAE folder of a known format: {', '.join([GRANARY, *FORMATS])}")
    return name


def load_any(
    path_or_hub_id: str | Path, ignore: Collection[str] = (), sites: Sites | None = None
) -> tuple[Dictionary, dict[str, Any]]:
    """(dictionary, provenance) of a folder of any known format, or of a hub repository.

    `ignore` names keys and tensors of another project's folder that are to be left out, `sites` where its dictionary
    reads and writes, which the files may not say.
    """
    folder = on_disk.locate(path_or_hub_id)
    name = detect(folder)
    if name == GRANARY:
        if ignore or sites:
            given = "--ignore is" if ignore else "--reads and --writes are"
            raise GranaryError(f"{given} for folders of other projects, {folder} is of this one")
        return load(folder, verify=True), on_disk.load_provenance(folder)
    raw = load_foreign(name, folder, ignore)
    raw = raw if sites is None else raw.at(sites)
    config, tensors = raw.to_checkpoint(BY_KIND)
    return VARIANTS[config.kind].from_tensors(config, tensors, str(folder)), raw.provenance


def convert(
    source: str | Path,
    target: Path,
    to: str,
    ignore: Collection[str] = (),
    sites: Sites | None = None,
    change: Change | None = None,
) -> str:
    """Write the dictionary in the folder or hub repository `source` as format `to`; returns the source's format.

    `ignore` and `sites` are those of ``load_any``; `change` is made before it is written. Raises GranaryError for a
    target that holds files, and for a dictionary that the format can't express.
    """
    if to not in (GRANARY, *WRITABLE):
        raise GranaryError(f"format {to!r} can't be written: choose from {', '.join([GRANARY, *WRITABLE])}")
    check_new(target)
    folder = on_disk.locate(source)
    found = detect(folder)
    made, provenance = load_any(folder, ignore, sites)
    if change is not None:
        made, provenance = change(str(source), made, provenance)
    with telling_disk_errors(target), making_folder(target) as filled:
        _write(made, provenance, folder if found == GRANARY else None, to, filled)
    return found


def _write(made: Dictionary, provenance: dict[str, Any], own: Path | None, to: str, target: Path) -> None:
    """Write `made` as format `to` into a folder; `own` is the source where it is of this project's format."""
    if to == GRANARY:
        training = on_disk.describe(own).training if own is not None else {}
        made.save_pretrained(target, provenance, training)
    else:
        save_foreign(to, made.config, made.state_dict(), provenance, target)


def check_new(target: Path) -> None:
    """Raise GranaryError for a folder that holds files."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GranaryError(f"{target} is not empty: choose another folder")


def _read_foreign(folder: Path) -> on_disk.Weights | None:
    name = foreign(folder)
    return None if name is None else load_foreign(name, folder).to_checkpoint(BY_KIND)


on_disk.FOREIGN_READERS.append(_read_foreign)
