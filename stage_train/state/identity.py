"""Whether a checkpoint belongs to the run that is asked for, and what differs when it does not."""

from collections.abc import Iterator, Mapping
from typing import Any

from shared.basics.config import marks
from shared.basics.errors import GranaryError
from stage_train.config import TrainSchema
from stage_train.sae_schema import auxk_slope_of

# What may change between the parts of one run, and what all runs of a job give alike; marked beside the fields.
FREE = frozenset(key for key, mark in marks(TrainSchema) if not mark.identity)
SHARED = frozenset(key for key, mark in marks(TrainSchema) if mark.shared)

# Keys that are younger than the first runs, with the value at which all is as before them: such a run keeps its id.
YOUNGER = {
    "reads": None,
    "writes": None,
    "variant.kind": "sae",
    "variant.tying": "none",
    "init_from": None,
    "stream.kinds": None,
    "sae.auxk_slope": 0.0,
}
# A younger default and the older one that it equals in all but long runs: older runs go on by it, where
# `Start.check_values` finds that both stand for the same.
ALIKE = {"optim.lr": ("by_width_and_length", "by_width")}
# Either may be raised: the run goes on.
LENGTHS = ("schedule.tokens", "schedule.epochs")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that fix the result, flattened: ``{"optim.lr": 0.001, ...}``; a key that is not known counts.

    ``sae.auxk_slope=auto`` counts as the number that it stands for, where ``sae.expansion`` says which, and else not:
    ``Start.check_values`` compares it where the widths are known.
    """
    found = {key: value for key, value in flatten(config) if key not in FREE}
    if found.get("sae.auxk_slope") == "auto":
        by_expansion = found.get("sae.d_latent") is None and found.get("sae.expansion") is not None
        found["sae.auxk_slope"] = auxk_slope_of(found["sae.expansion"]) if by_expansion else YOUNGER["sae.auxk_slope"]
    return {key: value for key, value in found.items() if (key, value) not in YOUNGER.items()}


def shared_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What describes the stream and the processes, flattened: ``{"stream.lanes": 64, ...}``."""
    return {key: value for key, value in flatten(config) if key in SHARED}


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with the older of each two values that are `ALIKE`."""
    found = dict(identity)
    for key, (younger, older) in ALIKE.items():
        if found.get(key) == younger:
            found[key] = older
    return found


def changed_keys(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ, sorted."""
    before, after = comparable(saved), comparable(wanted)
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]


def changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one text per key."""
    return [
        f"{key} was {saved.get(key, YOUNGER.get(key))}, is {wanted.get(key, YOUNGER.get(key))}"
        for key in changed_keys(saved, wanted)
    ]


def is_extension(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether `wanted` is the same run, only longer."""
    changed = changed_keys(saved, wanted)
    if len(changed) != 1 or changed[0] not in LENGTHS:
        return False
    before, after = saved.get(changed[0]), wanted.get(changed[0])
    return before is not None and after is not None and after > before


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: object) -> None:
    """Raise GranaryError naming what differs between two identities, unless it is a greater length."""
    changed = changes(saved, wanted)
    if changed and not is_extension(saved, wanted):
        raise GranaryError(
            f"{folder} holds a run with another configuration: {'; '.join(changed)}. Use the same, give this one "
            "a folder of its own by sae_name=..., or checkpoint.resume=never to discard the other"
        )


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings under dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
