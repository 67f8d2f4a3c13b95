"""Reading YAML that a user wrote, or that came with a folder."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from shared.basics.errors import GranaryError, first_line


def read_yaml(path: Path) -> Any:
    """Plain lists, dicts and values, interpolations as they stand; raises GranaryError naming the file.

    Tags that would make objects of other kinds are refused by the loader.
    """
    if not path.is_file():
        raise GranaryError(f"{path} is not there, or no file")
    try:
        content = OmegaConf.load(path)
        return OmegaConf.to_container(content, resolve=False)
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException, RecursionError, AssertionError) as error:
        raise GranaryError(f"{path} can't be read: {first_line(error)}") from error
