"""Which folder a run goes to: the one that is asked for, or one beside it where that holds another SAE."""

import glob
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.basics.documents import read_json, typed_at
from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.basics.yaml_file import read_yaml
from shared.parallel import World, broadcast_object
from stage_train.config import Resume, TrainSchema, as_dict
from stage_train.spec import on_device
from stage_train.state.export import digest
from stage_train.state.identity import changes, identity, is_extension
from stage_train.state.integrity import STATE, state_is_intact

log = logging.getLogger(__name__)

LONGEST_NAME = 80


def settled(cfg: TrainSchema, world: World) -> TrainSchema:
    """`cfg` with an ``out_dir`` that holds this run, an earlier and shorter one of the same settings, or none.

    The folder of another SAE is left as it is: this one goes beside it, named by what differs. The same command finds
    it again. ``checkpoint.resume=never`` and ``must`` mean the folder that is asked for.
    """
    if cfg.checkpoint.resume is not Resume.auto:
        return cfg
    wanted = identity(as_dict(on_device(cfg, world.device)))
    folder: str = broadcast_object(_find(Path(cfg.out_dir), wanted) if world.is_main else "")
    if folder == cfg.out_dir:
        return cfg
    _log_into(Path(folder), Path(cfg.out_dir))
    return replace(cfg, out_dir=folder)


def _log_into(folder: Path, instead_of: Path) -> None:
    """From here on, log files of one folder go on in another."""
    for handler in logging.root.handlers:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == instead_of.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            handler.close()  # it opens again when it is next written to
            handler.baseFilename = str(folder.resolve() / Path(handler.baseFilename).name)


def _find(asked: Path, wanted: Mapping[str, Any]) -> str:
    """The folder for a run of the identity `wanted`, when `asked` is asked for."""
    held = identity_in(asked)
    if held is None or _continues(held, wanted):
        return str(asked)
    beside = sorted(asked.parent.glob(f"{glob.escape(asked.name)},*"))
    mine = [folder for folder in beside if (there := identity_in(folder)) is not None and _continues(there, wanted)]
    found = mine[0] if mine else asked.with_name(f"{asked.name},{difference(held, wanted)}")
    if not mine and identity_in(found) is not None:
        found = found.with_name(f"{found.name},{digest(wanted)[:8]}")
    log.info("%s holds another SAE (%s): this one goes to %s", asked, "; ".join(changes(held, wanted)), found)
    return str(found)


def _continues(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return not changes(held, wanted) or is_extension(held, wanted)


def identity_in(folder: Path) -> Mapping[str, Any] | None:
    """Return that of the run whose checkpoint or exported SAE a folder holds; None without either."""
    for state in sorted(folder.glob(f"checkpoints/step-*/{STATE}"), reverse=True):
        if not state_is_intact(state.parent):
            continue  # one before it tells as well
        with suppress(GranaryError):
            return typed_at(read_json(state), "identity", dict[str, Any], state)  # type: ignore[no-any-return]
    if not RunFolder(folder).has_dictionary:
        return None
    try:
        config = read_yaml(RunFolder(folder).train_config)
    except GranaryError:  # an SAE from elsewhere, or a file that YAML does not understand
        return {}
    return identity({str(key): value for key, value in config.items()}) if isinstance(config, dict) else {}


def difference(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What sets a run apart from another, as the name of a folder: ``k=16,expansion=4``.

    A digest takes the place of what is too long, or can't be written in a name.
    """
    keys = [key for key in sorted(held.keys() | wanted.keys()) if held.get(key) != wanted.get(key)]
    name = ",".join(f"{key.rpartition('.')[2]}={_text(wanted.get(key))}" for key in keys)
    return name if re.fullmatch(r"[\w.=,+-]+", name) and len(name) <= LONGEST_NAME else digest(wanted)[:8]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
