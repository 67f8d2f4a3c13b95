"""A dictionary's folder and the store it is to be used on: whether they fit, told before anything runs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.basics.errors import GranaryError, first_line
from shared.basics.run_folder import CONFIG_FILE, WEIGHTS_FILE
from shared.sae.config import DictionaryConfig
from shared.sae.folder import Description, describe, is_own, locate
from shared.sae.loading import KINDS, load
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import Dictionary
from shared.store import Store
from shared.store.same_model import check_same_model


@dataclass(frozen=True)
class DictionaryFolder:
    """A dictionary that fits a store."""

    path: str
    """As it was found: a folder, or a hub id."""
    folder: Path
    """Where its files are."""
    config: DictionaryConfig
    description: Description
    """What its ``config.json`` says."""
    sites: Sites
    widths: SiteWidths

    def load(self, device: torch.device) -> Dictionary:
        """The dictionary on `device`, weights without gradient."""
        return load(self.folder, device=device).requires_grad_(False)

    def sha256(self) -> str:
        """Hash of its weights file."""
        return weights_sha256(self.folder)


def weights_sha256(folder: Path) -> str:
    """Hash of the weights file of a dictionary in this project's format."""
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_folder(path: str, store: Store, hook: str | None) -> DictionaryFolder:
    """Read a dictionary's description and check it against the store.

    Raises GranaryError for an unfinished or damaged folder, a hook that the store lacks, a width that differs from the
    hook's, and another language model.
    """
    folder = locate(path)
    check_whole(path, folder)
    description = describe(folder)
    config = description.config(KINDS)
    if description.sites is None and config.kind != "sae":
        raise GranaryError(
            f"{path} is a {config.kind} that does not record where it reads and writes: convert it from its own "
            "project's folder with --reads and --writes"
        )
    sites = choose_sites(path, description.sites, store, hook)
    widths = sites.widths({name: store.width(name) for name in sites.names})
    for verb, names, own, theirs in (
        ("reads", sites.reads, config.widths.d_in, widths.d_in),
        ("writes", sites.writes, config.widths.d_out, widths.d_out),
    ):
        if own != theirs:
            where = ", ".join(names)
            raise GranaryError(f"{path} {verb} activations of width {own}, but {where} has {theirs} in {store.url}")
    trained, harvested = description.provenance.get("model") or {}, store.plan.provenance.get("model") or {}
    check_same_model(path, trained, f"the store at {store.url}", harvested)
    return DictionaryFolder(path, folder, config, description, sites, widths)


def check_whole(path: str, folder: Path) -> None:
    """Raise GranaryError for a folder whose weights are missing, or shorter than their own header says."""
    if not is_own(folder):
        missing = next(name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file())
        raise GranaryError(f"{path} has no {missing}: finish its training with the command that began it")
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise GranaryError(f"{folder / WEIGHTS_FILE} is damaged ({first_line(error)}); export the SAE again") from None


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
