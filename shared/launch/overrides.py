"""The command line before Hydra sees it: shorthands, what a launcher implies, what secondary ranks must not do.

``model=PATH`` is accepted beside Hydra's ``model=<group option>``: a value that names no file of the group is taken as
``model.path=PATH``; ``device=cpu`` likewise; ``hooks.layers=8,16`` is a list.
"""

import os
import re
from collections.abc import Sequence
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from shared.launch.commands import override as quoted_override

# Groups that also take the value of one of their keys.
VALUE_SHORTHANDS = {"model": "model.path", "device": "device.name"}
# Keys that are lists by nature: a bare comma list is one value, and no sweep.
LISTS = ("hooks.layers", "hooks.sites")


def expand_shorthands(overrides: Sequence[str]) -> list[str]:
    """Rewrite ``model=/path/or/hub-id`` to ``model.path=...`` where no option of the group has that name.

    Also ``hooks.layers=8,16`` to a list.
    """
    expanded = []
    for override in overrides:
        group, equals, value = override.partition("=")
        is_option = (resources.files("conf") / group / f"{value}.yaml").is_file() if group in VALUE_SHORTHANDS else True
        if equals and not is_option and "," not in value:
            override = f"{VALUE_SHORTHANDS[group]}={value}"
        if group in LISTS and re.fullmatch(r"[\w-]+(,[\w-]+)+", value):
            override = f"{group}=[{value}]"
        expanded.append(override)
    return expanded


def quote_text(overrides: Sequence[str]) -> list[str]:
    """Quote the values that Hydra's grammar can't read, such as ``corpus.separator=<|endoftext|>``: they are text.

    Where the key is no text, what refuses the value then names the key.
    """
    parser = OverridesParser.create()

    def is_read(override: str) -> bool:
        try:
            parser.parse_overrides([override])
        except HydraException:
            return False
        return True

    def settled(override: str) -> str:
        key, equals, value = override.partition("=")
        if not equals or override.startswith("-") or is_read(override):
            return override
        quoted = quoted_override(key, value)
        return quoted if is_read(quoted) else override

    return [settled(override) for override in overrides]


def expand_launcher(arguments: Sequence[str]) -> list[str]:
    """Hydra uses a launcher in multiruns only: naming one asks for a multirun, of one job if need be.

    The flag goes first, wherever it was given: among the overrides Hydra would not take those behind it.
    """
    others = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    names_one = any(argument.startswith("hydra/launcher=") for argument in arguments)
    return ["--multirun", *others] if names_one or len(others) < len(arguments) else others


def rank_overrides() -> list[str]:
    """Under torchrun only rank 0 owns the run folder and the log file."""
    if os.environ.get("RANK", "0") == "0":
        return []
    return ["hydra.output_subdir=null", "hydra/job_logging=rank"]
