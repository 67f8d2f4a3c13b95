"""Hydra composes each choice of groups once: half a second of each composition, and the tests need some thousand.

`remember` makes Hydra keep what it composed of groups, which it does before it puts the values in. `composed` is
``hydra.compose`` for tests that train many runs: it keeps parsed overrides too, and leaves Hydra's own node out.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from hydra import compose, initialize_config_module
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from tests.isolation import REPOSITORY

# Choices of groups that many commands of the tests make.
OFTEN: dict[str, tuple[tuple[str, ...], ...]] = {
    "harvest": ((), ("corpus=text",), ("debug=tiny_harvest",)),
    "train": ((), ("debug=tiny_train",)),
    "eval": ((),),
    "inspect": ((),),
    "trace": ((),),
}
FIRST = (
    config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list, Hydra.get_mode
)  # fmt: skip
"""Hydra's own functions."""
LOCAL = {"sae", "optim", "schedule", "stream", "parallel", "logger", "device", "variant"}
"""Groups of training whose options say what is in the group alone; a variant's overlay ``sae`` too."""
_lists: dict[object, tuple[DefaultsList, dict[str, Any]]] = {}
_configs: dict[object, DictConfig] = {}


def remember(on: bool = True) -> None:
    """From now on Hydra keeps compositions in this process and in those that are forked from it; or no more."""
    made = (_list_once, _compose_once, _mode) if on else FIRST
    config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list, Hydra.get_mode = made


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
def _of_groups(schemas: frozenset[tuple[str, type]], config_name: str, *groups: str) -> DictConfig:
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
def _option(schemas: frozenset[tuple[str, type]], group: str, name: str) -> DictConfig:
    """What an option of a group puts into the whole."""
    return compose(f"{group}/{name}")


@cache
def _parsed(override: str) -> Override:
    (parsed,) = OverridesParser.create().parse_overrides([override])
    return parsed


def _schemas() -> frozenset[tuple[str, type]]:
    """What is in Hydra's store: a plan puts its schema in the place of training's."""

    def walk(nodes: Mapping[str, Any], path: str) -> Iterator[tuple[str, type]]:
        for name, node in nodes.items():
            if isinstance(node, Mapping):
                yield from walk(node, f"{path}/{name}")
            else:
                yield f"{path}/{name}", OmegaConf.get_type(node.node)

    return frozenset(walk(ConfigStore.instance().repo, ""))


def _sources(repo: Any) -> tuple[object, ...]:
    """All that a composition depends on beside its overrides."""
    return _schemas(), *((source.provider, source.path) for source in repo.get_sources())


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Hydra composes all for this; our configurations leave it to the command line's ``-m``."""
    return FIRST[2](self, config_name, overrides) if any("hydra.mode" in one for one in overrides) else None


def _list_once(
    repo: Any, config_name: str | None, overrides_list: list[Override], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    groups = [
        one.input_line
        for one in overrides_list
        if not one.is_sweep_override() and repo.group_exists(one.key_or_group) and not isinstance(one.value(), dict)
    ]
    key = (_sources(repo), config_name, tuple(groups), prepend_hydra, skip_missing)
    if key not in _lists:
        made = FIRST[0](repo, config_name, overrides_list, prepend_hydra, skip_missing)
        _lists[key] = made, dict(made.overrides.known_choices)
        return made
    first, choices = _lists[key]
    overrides = Overrides(repo=repo, overrides_list=overrides_list)
    overrides.known_choices = dict(choices)
    return DefaultsList(
        defaults=list(first.defaults),
        defaults_tree=first.defaults_tree,
        config_overrides=overrides.config_overrides,
        overrides=overrides,
    )


def _compose_once(self: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> DictConfig:
    parts = ((one.config_path, one.parent, one.package, one.is_self, one.primary) for one in defaults)
    key = (_sources(repo), tuple(parts))
    if key not in _configs:
        _configs[key] = FIRST[1](self, defaults, repo)
    return copy.deepcopy(_configs[key])
