"""From a composed configuration to the object that a stage reads: keys that nobody would read are refused by name."""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from shared.basics.config import marks
from shared.basics.errors import GranaryError
from shared.launch.peer_names import KEYS

MOST_SUGGESTED = 3


def fill(cfg: DictConfig | ListConfig) -> Any:
    """The configuration as an object of its schema. Raises GranaryError for a key that the schema lacks.

    Hydra's ``+key=value`` puts any key into any node, a mistyped one too.
    """
    for name, schema in unknown_keys(cfg) if isinstance(cfg, DictConfig) else ():
        raise GranaryError(f"unknown configuration key {name!r}{suggestion(name, schema)}")
    return OmegaConf.to_object(cfg)


def schema_of(config_name: str) -> type:
    """The schema that a stage registered for ``conf/<config_name>.yaml``."""
    schema = OmegaConf.get_type(ConfigStore.instance().load(f"{config_name}_schema.yaml").node)
    assert schema is not None
    return schema


def unknown_keys(cfg: DictConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Keys in `cfg` and below, dotted, that the schema of their node lacks, with that schema."""
    schema = OmegaConf.get_type(cfg)
    known = schema.__dataclass_fields__ if schema is not None and is_dataclass(schema) else None
    for key in map(str, cfg):
        if schema is not None and known is not None and key not in known:
            yield f"{prefix}{key}", schema
            continue
        unset = OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key)
        if not unset and isinstance(node := cfg[key], DictConfig):
            yield from unknown_keys(node, f"{prefix}{key}.")


def suggestion(key: str, schema: type) -> str:
    """`` (did you mean ...?)`` from the keys of the schema that refused `key`, which is dotted; or what there is.

    A key that lies deeper under the same name is suggested first, then what other trainers call so, then what is
    spelled alike.
    """
    group, dot, name = key.rpartition(".")
    names = [one.name for one in fields(schema)]
    dotted = [known for known, _ in marks(schema)]
    close = [known for known in dotted if known.rpartition(".")[2] == name]
    if not close and name in KEYS and KEYS[name].partition(".")[0] in names:
        close = [KEYS[name]]
    close = close or difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {' or '.join(repr(group + dot + one) for one in close[:MOST_SUGGESTED])}?)"
    return f": choose from {', '.join(sorted(names))}"
