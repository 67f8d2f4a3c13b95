"""The configuration of a stage as an object, for those who call it from Python: composed as its command line is."""

import json
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from os import PathLike, fspath
from typing import Any

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from shared.basics.errors import GranaryError
from shared.launch import commands
from shared.launch.config_errors import describe_config_error
from shared.launch.schema import fill, schema_of
from shared.launch.stage import spelt_out


def composed(config_name: str, overrides: Sequence[str]) -> Any:
    """The schema object of ``conf/<config_name>.yaml`` with `overrides`, whose schemas are registered already.

    Raises GranaryError, in the words of the command line, for a key or a value that it would refuse.
    """
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return fill(compose(config_name, spelt_out(overrides, schema_of(config_name))))
    except (HydraException, OmegaConfBaseException) as error:
        raise GranaryError(describe_config_error(error)) from error


def as_overrides(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``{"name": "mine", "sae": {"k": 32}}`` as ``name=mine``, ``sae.k=32``: what a command line would say.

    A text is taken as it stands, whatever signs it holds. Raises GranaryError for a value that no key can have.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from as_overrides(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={_written(f'{prefix}{name}', value)}"


def _written(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    if isinstance(value, str | PathLike):
        return commands.override(key, fspath(value)).partition("=")[2]
    if isinstance(value, Sequence):
        return f"[{','.join(_written(key, one) for one in value)}]"
    raise GranaryError(f"{key}={value!r}: give a text, a number, true or false, None, or a list or dict of these")
