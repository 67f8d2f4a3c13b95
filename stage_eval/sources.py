"""Which SAEs are meant, and whether they fit the store and the model; wrong inputs are told before anything runs."""

import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.basics.errors import GranaryError
from shared.basics.run_folder import CONFIG_FILE, WEIGHTS_FILE
from shared.lm import model_identity
from shared.lm.hookpoint import HookPoint
from shared.sae import SAE, DictionaryConfig, load_config, load_provenance
from shared.sae.folder import is_own, locate
from shared.sae.formats import foreign
from shared.store import Store
from stage_eval.config import ModelInput

HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Source:
    """One SAE to evaluate."""

    name: str
    """How tables and reports call it."""
    path: str
    """As it was found: a folder, or a hub id."""
    folder: Path
    """Where its files are."""
    config: DictionaryConfig
    provenance: dict[str, Any]
    hook: HookPoint

    def load(self, device: Any) -> SAE:
        """The SAE on `device`, weights without gradient."""
        return SAE.from_pretrained(self.folder, device=device).requires_grad_(False)

    def sha256(self) -> str:
        """Hash of its weights file."""
        digest = hashlib.sha256()
        with (self.folder / WEIGHTS_FILE).open("rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
        return digest.hexdigest()


def find_sources(spec: Any, store: Store, hook: str | None) -> list[Source]:
    """The SAEs that `spec` (a path, glob, hub id or list of these) names, checked against `store`.

    Raises GranaryError for a path without SAEs, a hook that the store lacks, or a width that differs from the hook's.
    """
    paths: list[str] = []
    for part in spec if isinstance(spec, list) else [spec]:
        paths += [path for path in expand(str(part)) if path not in paths]
    names = short_names(paths)
    return [make_source(name, path, store, hook) for name, path in zip(names, paths, strict=True)]


def expand(spec: str) -> list[str]:
    """SAE folders of one part of the specification; a hub id stands for itself."""
    if is_own(Path(spec)):
        return [spec]
    if Path(spec).is_dir():
        found = [str(path.parent) for path in Path(spec).rglob(WEIGHTS_FILE) if is_own(path.parent)]
        if not found and (name := foreign(Path(spec))) is not None:
            command = f"python -m shared.sae convert {spec} NEW --to granary"
            raise GranaryError(f"{spec} is an SAE in the {name} format: convert it first, {command}")
        if not found:
            raise GranaryError(f"no SAE in {spec}: an SAE folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        return sorted(found, key=natural_key)
    if glob.has_magic(spec):
        found = [folder for path in glob.glob(spec, recursive=True) if Path(path).is_dir() for folder in expand(path)]
        if not found:
            raise GranaryError(f"no SAE folder matches {spec}")
        return sorted(set(found), key=natural_key)
    locate(spec)
    return [spec]


def make_source(name: str, path: str, store: Store, hook: str | None) -> Source:
    """Read the SAE's description and check it against the store."""
    folder = locate(path)
    config, provenance = load_config(folder), load_provenance(folder)
    recorded = provenance.get("hook")
    chosen = hook or recorded or (store.hooks[0] if len(store.hooks) == 1 else None)
    if chosen is None:
        raise GranaryError(f"{path} does not record its hook: give hook=..., one of {', '.join(store.hooks)}")
    if chosen not in store.hooks:
        why = "" if hook else f", which {path} was trained on"
        raise GranaryError(f"the store at {store.url} has no hook {chosen}{why}: it has {', '.join(store.hooks)}")
    width = store.plan.hooks[chosen]
    if config.widths.d_in != width:
        raise GranaryError(
            f"{path} reads activations of width {config.widths.d_in}, but {chosen} has {width} in {store.url}"
        )
    trained, harvested = provenance.get("model") or {}, store.plan.provenance.get("model") or {}
    check_same_model(path, trained, f"the store at {store.url}", harvested)
    return Source(name, path, folder, config, provenance, HookPoint.parse(chosen))


def check_same_model(one: str, identity: dict[str, Any], other: str, expected: dict[str, Any]) -> None:
    """Raise GranaryError if two records of the language model that both exist differ in configuration or weights."""
    for key in ("config_hash", "weights_hash"):
        if key in identity and key in expected and identity[key] != expected[key]:
            what = "configuration" if key == "config_hash" else "weights"
            raise GranaryError(
                f"{one} belongs to model {identity.get('id')}, {other} to {expected.get('id')}: the models'"
                f" {what} differ"
            )


def model_path(cfg: ModelInput, store: Store) -> tuple[str, str | None, str]:
    """(path, revision, dtype) of the model to splice into: the configured ones, else those the store records.

    Raises GranaryError if the model is not the harvested one and ``model.allow_other`` is not set.
    """
    recorded: dict[str, Any] = store.plan.provenance.get("model") or {}
    path, revision = cfg.path, cfg.revision
    if path is None:
        path = recorded.get("id")
        if path is None:
            raise GranaryError(f"the store at {store.url} does not record its model: give model=PATH")
        if recorded.get("revision"):
            revision = recorded["revision"]
        elif path != "bundled":
            path = store.plan.versions.get("model_path", path)
            if not Path(path).is_dir():
                raise GranaryError(f"the harvested model was at {path}, which is not here: give model=PATH")
    dtype = cfg.dtype.value if cfg.dtype is not None else recorded.get("dtype", "float32")
    if not cfg.allow_other:
        try:
            check_same_model(f"model={path}", {**model_identity(path, revision, dtype)}, store.url, recorded)
        except GranaryError as error:
            if "differ" not in str(error):
                raise
            raise GranaryError(f"{error}; model.allow_other=true evaluates it all the same") from None
    return path, revision, dtype


def short_names(paths: list[str]) -> list[str]:
    """The paths without what they share: sweep folders are called by their last part, a lone SAE by its last two."""
    parts = [Path(path).parts for path in paths]
    if len(paths) == 1:
        return ["/".join(parts[0][-2:]).lstrip("/")]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def natural_key(path: str) -> list[tuple[int, str]]:
    """Orders ``k=8`` before ``k=16``."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", path)]
