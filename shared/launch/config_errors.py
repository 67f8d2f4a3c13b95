"""What is wrong with a configuration, in one line that names the key and the nearest valid one."""

import re
from dataclasses import is_dataclass
from importlib import resources
from pathlib import Path

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from shared.launch.schema import suggestion


def describe_config_error(error: Exception) -> str:
    """One line that names the key and the nearest valid one."""
    full_key = getattr(error, "full_key", None)
    text = str(error).strip().splitlines()[0]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        full_key = cause.full_key or full_key
        text = str(cause).strip().splitlines()[0]
    unknown = re.search(r"Key '([^']+)' (?:is not in struct|not in '([^']+)')", text)
    if unknown:
        key = full_key or unknown[1]
        schema = getattr(cause or error, "object_type", None)
        known = suggestion(key, schema) if isinstance(schema, type) and is_dataclass(schema) else ""
        return f"unknown configuration key {key!r}{known}"
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", text)
    if missing:
        key = full_key or missing[1]
        return f"{key} has no value: give {key}=... on the command line"
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=([^']*)'", text)
    if ambiguous:
        key, values = ambiguous.groups()
        return f"{key}={values} is a sweep: add -m, or write {key}=[{values}] for a list"
    if isinstance(error, OverrideParseException):
        return (
            f'{error.override} can\'t be read: write key=value, text with special signs as key="..." in single quotes'
        )
    option = re.search(r"Could not find '([^']+)'", text) or re.search(r"Could not load '([^']+)'", text)
    if option and option[1].startswith("hydra/launcher/submitit"):
        return "hydra/launcher=slurm needs submitit: pip install 'granary-sae[slurm]'"
    if option:
        parts = option[1].split("/")
        depth = max((n for n in range(1, len(parts)) if group_options("/".join(parts[:n]))), default=len(parts) - 1)
        group, name = "/".join(parts[:depth]), "/".join(parts[depth:])
        return f"no option {name!r} in group {group!r}: choose from {', '.join(group_options(group))}"
    prefix = f"{full_key}: " if full_key and full_key not in text else ""
    return f"{prefix}{text}"


def group_options(group: str) -> list[str]:
    """Names of the YAML files of a config group."""
    folder = Path(str(resources.files("conf"))) / group
    return sorted(path.stem for path in folder.glob("*.yaml"))
