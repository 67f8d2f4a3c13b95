"""Hydra composes each choice of groups once: half a second of each composition, and the tests need some thousand.

`remember` makes Hydra keep what it composed of groups, which it does before it puts the values in, for all processes of
a session of tests. `composed` is ``hydra.compose`` for tests that train many runs: it keeps parsed overrides too, and
leaves Hydra's own node out.
"""

import copy
import hashlib
import os
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, open_dict

from tests.isolation import REPOSITORY, shared_folder

# Choices of groups that many commands of the tests make.
OFTEN: dict[str, tuple[tuple[str, ...], ...]] = {
    "harvest": ((), ("corpus=text",), ("debug=tiny_harvest",)),
    "train": ((), ("debug=tiny_train",)),
    "eval": ((),),
    "inspect": ((),),
    "trace": ((),),
}
LOCAL = {"sae", "optim", "schedule", "stream", "parallel", "logger", "device", "variant"}
"""Groups of training whose options say what is in the group alone; a variant's overlay ``sae`` too."""
_made: dict[object, Any] = {}


def remember(on: bool = True) -> None:
    """From now on Hydra keeps compositions in this process and finds those of others; or no more."""
    for (owner, name), ours in OURS.items():
        if on:
            setattr(owner, name, ours)
        elif (owner, name) in FIRST:
            setattr(owner, name, FIRST[owner, name])
        elif name in vars(owner):
            delattr(owner, name)


def prepare(registers: Sequence[Callable[[], None]], stages: Collection[str] = OFTEN) -> None:
    """Compose what is asked for `OFTEN` of the stages; `registers` put their schemas into Hydra's store."""
    remember()
    for register in registers:
        register()
    with initialize_config_module("conf", version_base="1.3"):
        for stage in stages:
            for groups in OFTEN[stage]:
                compose(stage, overrides=list(groups))


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What ``compose(config_name, overrides)`` gives or raises, where Hydra is initialised with ``conf``."""
    groups = [one for one in overrides if one.lstrip("+~").partition("=")[0] in _groups()]
    cfg = copy.deepcopy(_of_groups(_schemas(), config_name, *groups))
    ConfigLoaderImpl._apply_overrides_to_config([_parsed(one) for one in overrides if one not in groups], cfg)
    return cfg


@cache
def _groups() -> set[str]:
    return {path.name for path in (REPOSITORY / "conf").iterdir() if path.is_dir()}


@cache
def _of_groups(schemas: tuple[tuple[str, type], ...], config_name: str, *groups: str) -> DictConfig:
    chosen = dict(one.split("=", 1) for one in groups)
    if config_name != "train" or not chosen or not chosen.keys() <= LOCAL:
        return compose(config_name, overrides=list(groups))
    try:
        options = {group: _option(schemas, group, name) for group, name in chosen.items()}
    except HydraException:  # which in the words of the whole names the group
        return compose(config_name, overrides=list(groups))
    cfg = copy.deepcopy(_of_groups(schemas, config_name))
    with open_dict(cfg):
        for group in sorted(options, key="variant".__eq__):  # which overlays the others
            if group != "variant":
                cfg[group] = copy.deepcopy(options[group][group])
                continue
            del cfg.variant
            cfg.merge_with(options[group])
    return cfg


@cache
def _option(schemas: tuple[tuple[str, type], ...], group: str, name: str) -> DictConfig:
    """What an option of a group puts into the whole."""
    return compose(f"{group}/{name}")


@cache
def _parsed(override: str) -> Override:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    return parsed


def _schemas() -> tuple[tuple[str, type], ...]:
    """What is in Hydra's store: a plan puts its schema in the place of training's."""

    def walk(nodes: Mapping[str, Any], path: str) -> Iterator[tuple[str, type]]:
        for name, node in nodes.items():
            if isinstance(node, Mapping):
                yield from walk(node, f"{path}/{name}")
            else:
                yield f"{path}/{name}", OmegaConf.get_type(node.node)

    return tuple(sorted(walk(ConfigStore.instance().repo, ""), key=itemgetter(0)))


def _sources(repo: Any) -> tuple[object, ...]:
    """All that a composition depends on beside its overrides."""
    return _schemas(), *((source.provider, source.path) for source in repo.get_sources())


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Hydra composes all for this; our configurations leave it to the command line's ``-m``."""
    return (
        FIRST[Hydra, "get_mode"](self, config_name, overrides)
        if any("hydra.mode" in one for one in overrides)
        else None
    )


def _once(key: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """What `make` gives for this key, made by one process of the session: some hundred choices, in hundreds of
    processes."""
    if key in _made:
        return _made[key]
    file = shared_folder() / hashlib.sha256(repr(key).encode()).hexdigest()
    if file.exists():
        made = pickle.loads(file.read_bytes())
    else:
        made = make()
        try:
            data = pickle.dumps(made)
        except (AttributeError, pickle.PicklingError):  # a schema that is defined within a test
            data = b""
        if data:
            part = file.with_suffix(f".{os.getpid()}")
            part.write_bytes(data)
            part.replace(file)
    _made[key] = made
    return made


def _list_once(
    repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    groups = [
        one.input_line
        for one in overrides_list
        if not one.is_sweep_override() and repo.group_exists(one.key_or_group) and not isinstance(one.value(), dict)
    ]

    def make() -> tuple[Any, Any, dict[str, Any]]:
        made = FIRST[config_loader_impl, "create_defaults_list"](
            repo, config_name, overrides_list, prepend_hydra, skip_missing
        )
        return made.defaults, made.defaults_tree, dict(made.overrides.known_choices)

    key = ("list", _sources(repo), config_name, tuple(groups), prepend_hydra, skip_missing)
    defaults, tree, choices = _once(key, make)
    overrides = Overrides(repo=repo, overrides_list=overrides_list)
    overrides.known_choices = dict(choices)
    return DefaultsList(
        defaults=list(defaults),
        defaults_tree=tree,
        config_overrides=overrides.config_overrides,
        overrides=overrides,
    )


def _compose_once(self: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> DictConfig:
    parts = ((one.config_path, one.parent, one.package, one.is_self, one.primary) for one in defaults)
    key = ("configuration", _sources(repo), tuple(parts))
    first = FIRST[ConfigLoaderImpl, "_compose_config_from_defaults_list"]
    return copy.deepcopy(_once(key, lambda: first(self, defaults, repo)))


def _load_once(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    first = FIRST[ConfigRepository, "load_config"]
    return copy.deepcopy(_once(("file", _sources(self), config_path), lambda: first(self, config_path)))


def _same(self: ConfigStore, memo: object) -> ConfigStore:
    """A composition copies the list of sources so as to change it, and with it all schemas, which it leaves alone."""
    return self


OURS: dict[tuple[Any, str], Callable[..., Any]] = {
    (config_loader_impl, "create_defaults_list"): _list_once,
    (ConfigLoaderImpl, "_compose_config_from_defaults_list"): _compose_once,
    (ConfigRepository, "load_config"): _load_once,
    (ConfigStore, "__deepcopy__"): _same,
    (Hydra, "get_mode"): _mode,
}
FIRST = {(owner, name): getattr(owner, name) for owner, name in OURS if hasattr(owner, name)}
"""Hydra's own functions."""
