"""Which SAEs are meant, and whether they fit the store and the model; wrong inputs are told before anything runs."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from shared.basics.errors import GranaryError
from shared.basics.run_folder import WEIGHTS_FILE
from shared.lm.identity import check_same_model
from shared.sae.config import DictionaryConfig
from shared.sae.finding import check_whole, expand
from shared.sae.folder import Description, describe, locate
from shared.sae.loading import KINDS, load
from shared.sae.sites import Sites, SiteWidths
from shared.store import Store
from stage_eval.config import SAEInput
from stage_eval.grid import is_of_grid, last_grid
from stage_eval.measure.session import Loaded
from stage_eval.results.comparison import LeftOut


@dataclass(frozen=True)
class SAEFolder:
    """One dictionary to evaluate."""

    name: str
    """How tables and reports call it."""
    path: str
    """As it was found: a folder, or a hub id."""
    folder: Path
    """Where its files are."""
    config: DictionaryConfig
    description: Description
    """What its ``config.json`` says."""
    sites: Sites
    widths: SiteWidths

    def load(self, device: torch.device) -> Loaded:
        """The dictionary on `device`, weights without gradient."""
        dictionary = load(self.folder, device=device).requires_grad_(False)
        return Loaded(self.spliced, self.sites, self.widths, dictionary)

    @property
    def spliced(self) -> str:
        """Name of the condition in which it is spliced into the language model."""
        return f"sae {self.name}"

    def sha256(self) -> str:
        """Hash of its weights file."""
        with (self.folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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
            folders.append(open_folder(path, store, hook))
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


def open_folder(path: str, store: Store, hook: str | None) -> SAEFolder:
    """Read a dictionary's description and check it against the store; the name is its path for the time being."""
    folder = locate(path)
    check_whole(path, folder)
    description = describe(folder)
    config = description.config(KINDS)
    sites = choose_sites(path, description.sites, store, hook)
    widths = sites.widths(store.plan.hooks)
    for verb, names, own, theirs in (
        ("reads", sites.reads, config.widths.d_in, widths.d_in),
        ("writes", sites.writes, config.widths.d_out, widths.d_out),
    ):
        if own != theirs:
            where = ", ".join(names)
            raise GranaryError(f"{path} {verb} activations of width {own}, but {where} has {theirs} in {store.url}")
    trained, harvested = description.provenance.get("model") or {}, store.plan.provenance.get("model") or {}
    check_same_model(path, trained, f"the store at {store.url}", harvested)
    return SAEFolder(path, path, folder, config, description, sites, widths)


def choose_sites(path: str, recorded: Sites | None, store: Store, hook: str | None) -> Sites:
    """Where the dictionary reads and writes: as it records, as one of one site is told by `hook`, or the only place.

    Raises GranaryError where none of these says, and for a site that the store lacks.
    """
    if hook is not None and recorded is not None and not (recorded.is_autoencoder and len(recorded.reads) == 1):
        raise GranaryError(f"hook={hook} is for dictionaries of one site, but {path} has {recorded}: leave it out")
    if hook is not None:
        sites = Sites.of(hook)
    elif recorded is not None:
        sites = recorded
    elif len(store.hooks) == 1:
        sites = Sites.of(store.hooks[0])
    else:
        raise GranaryError(f"{path} does not record its hook: give hook=..., one of {', '.join(store.hooks)}")
    for name in sites.names:
        if name not in store.hooks:
            why = "" if hook else f", which {path} was trained on"
            raise GranaryError(f"the store at {store.url} has no hook {name}{why}: it has {', '.join(store.hooks)}")
    return sites


def short_names(paths: list[str]) -> list[str]:
    """The paths without what they share: sweep folders are called by their last part, a lone SAE by its last two."""
    parts = [Path(path).parts for path in paths]
    if len(paths) == 1:
        return ["/".join(parts[0][-2:]).lstrip("/")]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]
