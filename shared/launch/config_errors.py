"""What is wrong with a configuration, in one line that names the key and the nearest valid one."""

import difflib
import re
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException


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
        return f"unknown configuration key {key!r}{suggestion(cause or error, unknown[1])}"
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", text)
    if missing:
        key = full_key or missing[1]
        return f"{key} has no value: give {key}=... on the command line"
    ambiguous = re.search(r"Ambiguous value for argument '([^=]+)=([^']*)'", text)
    if ambiguous:
        key, values = ambiguous.groups()
        return f"{key}={values} is a sweep: add -m, or write {key}=[{values}] for a list"
    option = re.search(r"Could not find '([^']+)'", text) or re.search(r"Could not load '([^']+)'", text)
    if option and option[1].startswith("hydra/launcher/submitit"):
        return "hydra/launcher=slurm needs submitit: pip install 'granary[slurm]'"
    if option:
        group, _, name = option[1].rpartition("/")
        return f"no option {name!r} in group {group!r}: choose from {', '.join(group_options(group))}"
    prefix = f"{full_key}: " if full_key and full_key not in text else ""
    return f"{prefix}{text}"


def suggestion(error: BaseException, key: str) -> str:
    """`` (did you mean ...?)`` from the valid keys of the node that refused `key`."""
    object_type = getattr(error, "object_type", None)
    names: list[str] = list(getattr(object_type, "__dataclass_fields__", {}))
    parent = getattr(error, "parent_node", None)
    if not names and isinstance(parent, DictConfig):
        names = [str(name) for name in parent]
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f": choose from {', '.join(sorted(names))}" if names else ""


def group_options(group: str) -> list[str]:
    """Names of the YAML files of a config group."""
    folder = Path(str(resources.files("conf"))) / group
    return sorted(path.stem for path in folder.glob("*.yaml"))
