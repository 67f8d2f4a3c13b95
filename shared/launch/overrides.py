"""The command line before Hydra sees it: shorthands, what a launcher implies, what secondary ranks must not do.

``model=PATH`` is accepted beside Hydra's ``model=<group option>``: a value that names no file of the group is taken as
``model.path=PATH``; ``device=cpu`` likewise; ``hooks.layers=8,16`` is a list, ``variant.ranks={16:1,8:2}`` a text.
"""

import os
import re
from collections.abc import Sequence
from importlib import resources

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from shared.basics.config import marks
from shared.launch import commands

# Groups that also take the value of one of their keys.
VALUE_SHORTHANDS = {"model": "model.path", "device": "device.name"}
# Keys that are lists by nature: a bare comma list is one value, and no sweep.
LISTS = ("hooks.layers", "hooks.sites")
# Keys whose value {a:b,...} is one text: Hydra would add its entries, key by key, to what the configuration knows.
TABLES = ("variant.ranks",)
# Hydra's key for what it leaves out of the name of a job.
UNNAMED = "hydra.job.config.override_dirname.exclude_keys"


def expand_shorthands(overrides: Sequence[str]) -> list[str]:
    """Rewrite ``model=/path/or/hub-id`` to ``model.path=...`` where no option of the group has that name.

    Also ``hooks.layers=8,16`` to a list, and ``variant.ranks={16:1,8:2}`` to a text.
    """
    expanded = []
    for override in overrides:
        group, equals, value = override.partition("=")
        is_option = (resources.files("conf") / group / f"{value}.yaml").is_file() if group in VALUE_SHORTHANDS else True
        if equals and not is_option and "," not in value:
            override = f"{VALUE_SHORTHANDS[group]}={value}"
        if group in LISTS and re.fullmatch(r"[\w-]+(,[\w-]+)+", value):
            override = f"{group}=[{value}]"
        if group in TABLES and re.fullmatch(r"(\{[\w:, -]*\},?)+(?<!,)", value):
            override = f"{group}=" + re.sub(r"\{.*?\}", lambda table: f'"{table[0]}"', value.replace(" ", ""))
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
        quoted = commands.override(key, value)
        return quoted if is_read(quoted) else override

    return [settled(override) for override in overrides]


def expand_launcher(arguments: Sequence[str]) -> list[str]:
    """Hydra uses a launcher in multiruns only: naming one asks for a multirun, of one job if need be.

    The flag goes first, wherever it was given: among the overrides Hydra would not take those behind it.
    """
    others = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    names_one = any(argument.startswith("hydra/launcher=") for argument in arguments)
    return ["--multirun", *others] if names_one or len(others) < len(arguments) else others


def name_swept_keys(arguments: Sequence[str], schema: type) -> list[str]:
    """Name keys that are no part of a sweep folder's name as one where they take several values.

    Two stores in one sweep are else two runs in one folder. ``name`` and ``run_dir`` move the whole sweep.
    """
    unnamed = [name for name, mark in marks(schema) if not mark.named]
    if "--multirun" not in arguments or any(argument.startswith(f"{UNNAMED}=") for argument in arguments):
        return list(arguments)
    given = OverridesParser.create().parse_overrides([one for one in arguments if not one.startswith("-")])
    swept = {one.get_key_element() for one in given if one.is_sweep_override()} & set(unnamed) - {"name", "run_dir"}
    left = [name for name in unnamed if name not in swept]
    return [*arguments, f"{UNNAMED}=[{','.join(left)}]"] if swept else list(arguments)


def rank_overrides() -> list[str]:
    """Return what a rank is given: under torchrun only rank 0 owns the run folder and the log file."""
    if os.environ.get("RANK", "0") == "0":
        return []
    return ["hydra.output_subdir=null", "hydra/job_logging=rank"]


def path_overrides(overrides: Sequence[str]) -> list[str]:
    """``sae=PATH`` and ``model=PATH`` as the keys they stand for, quoted: sweep folders hold ``=`` and commas."""
    expanded = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in ("sae", "sae.path", "model", "model.path"):
            is_quoted = value[:1] in ("'", '"', "[") or value == "null"
            value = value if is_quoted else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
            override = f"{key.partition('.')[0]}.path={value}"
        expanded.append(override)
    return expanded


def run_overrides(arguments: Sequence[str]) -> list[str]:
    """A run that is named without a key: ``runs/demo`` as ``run_dir=runs/demo``, ``demo`` as ``name=demo``."""
    found = []
    for argument in arguments:
        if "=" not in argument and not argument.startswith(("-", "~", "+")):
            is_folder = "/" in argument or os.path.isdir(argument)
            argument = commands.override("run_dir" if is_folder else "name", argument)
        found.append(argument)
    return found
