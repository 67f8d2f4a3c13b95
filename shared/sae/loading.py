"""Loading a dictionary of any kind and of any project's format, and converting between formats."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
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


def settled(path: Path, reads_as: str | None) -> str:
    """Name of the format that `path` is read as; raises GranaryError for a name that is none, and for a lone file."""
    if reads_as is not None and reads_as not in FORMATS:
        raise GranaryError(f"--as {reads_as}{meant(reads_as, FORMATS)}: choose from {', '.join(FORMATS)}")
    if reads_as is None and path.is_file():
        raise GranaryError(
            f"{path} is a file, not the folder of an SAE: say what it is by --as FORMAT, one of {', '.join(FORMATS)}"
        )
    return reads_as or detect(path)


def meant(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` where `name` is nearly a known one."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def placed(path_or_hub_id: str | Path) -> Path:
    """A lone file as it is, a folder or a hub repository as ``shared.sae.folder.locate`` finds it."""
    return Path(path_or_hub_id) if Path(path_or_hub_id).is_file() else on_disk.locate(path_or_hub_id)


def load_any(
    path_or_hub_id: str | Path,
    ignore: Collection[str] = (),
    sites: Sites | None = None,
    *,
    reads_as: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> tuple[Dictionary, dict[str, Any]]:
    """(dictionary, provenance) of a folder of any known format, of a hub repository, or of a lone file of weights.

    Of another project's folder or file: `ignore` names keys and tensors that are to be left out, `sites` where its
    dictionary reads and writes, `reads_as` its format and `given` its settings, where the files do not say them.
    """
    folder = placed(path_or_hub_id)
    name = settled(folder, reads_as)
    if name == GRANARY:
        if ignore or sites or given:
            what = "--ignore is" if ignore else "--reads and --writes are" if sites else "--set is"
            raise GranaryError(f"{what} for folders of other projects, {folder} is of this one")
        return load(folder, verify=True), on_disk.load_provenance(folder)
    raw = load_foreign(name, folder, ignore, given)
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
    *,
    reads_as: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> str:
    """Write the dictionary in `source`, a folder, hub repository or file, as format `to`; returns the source's format.

    `change` is made before it is written, the others are those of ``load_any``. Raises GranaryError for a target that
    holds files, and for a dictionary that the format can't express.
    """
    if to not in (GRANARY, *WRITABLE):
        names = [GRANARY, *WRITABLE]
        raise GranaryError(f"format {to!r} can't be written{meant(to, names)}: choose from {', '.join(names)}")
    check_new(target)
    folder = placed(source)
    found = settled(folder, reads_as)
    made, provenance = load_any(folder, ignore, sites, reads_as=reads_as, given=given)
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
