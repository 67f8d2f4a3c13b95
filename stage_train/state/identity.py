"""Whether a checkpoint belongs to the run that is asked for, and what differs when it does not."""

from collections.abc import Iterator, Mapping
from typing import Any

from shared.basics.config import marks
from shared.basics.errors import GranaryError
from stage_train.config import TrainSchema

# What may change between the parts of one run, and what all runs of a job give alike; marked beside the fields.
FREE = frozenset(key for key, mark in marks(TrainSchema) if not mark.identity)
SHARED = frozenset(key for key, mark in marks(TrainSchema) if mark.shared)

# Keys that are younger than the first runs, with the value at which all is as before them: such a run keeps its id.
YOUNGER = {"reads": None, "writes": None, "variant.kind": "sae"}


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that fix the result, flattened: ``{"optim.lr": 0.001, ...}``; a key that is not known counts."""
    return {key: value for key, value in flatten(config) if key not in FREE and (key, value) not in YOUNGER.items()}


def shared_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What describes the stream and the processes, flattened: ``{"stream.lanes": 64, ...}``."""
    return {key: value for key, value in flatten(config) if key in SHARED}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: object) -> None:
    """Raise GranaryError naming what differs between two identities."""
    changed = [
        f"{key} was {saved.get(key)}, is {wanted.get(key)}"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if changed:
        raise GranaryError(
            f"{folder} holds a run with another configuration: {'; '.join(changed)}. Use the same, another name=..., "
            "or checkpoint.resume=never to discard it"
        )


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings under dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
