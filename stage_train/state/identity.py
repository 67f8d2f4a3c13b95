"""Whether a checkpoint belongs to the run that is asked for, and what differs when it does not."""

from collections.abc import Iterator, Mapping
from typing import Any

from shared.basics.errors import GranaryError

# What may change between the parts of one run: nothing here alters its result.
FREE = (
    "name",
    "run_dir",
    "sae_name",
    "out_dir",
    "nproc",
    "packed",
    "store.url",  # the checkpoint knows the store by its digest
    "store.others",
    "checkpoint.",
    "logger.",
    "device.",
    "compute.kernels",
    "parallel.",
    "optim.micro_batch",
    "stream.prefetch_gib",
    "stream.io_threads",
    "stream.buffer",
    "stream.on_damage",  # so that a run which stopped at a damaged shard can go on without it
)

# Keys that older runs did not record, and what they did in their place.
ADDED_SINCE = {"variant.kind": "sae"}


# Keys that are younger than the first runs: null is as if they were not there, so that a run keeps its id.
YOUNGER = ("reads", "writes", "init_from")
# Either may be raised: the run goes on.
LENGTHS = ("schedule.tokens", "schedule.epochs")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that fix the result, flattened: ``{"optim.lr": 0.001, ...}``."""
    return {
        key: value
        for key, value in flatten(config)
        if not key.startswith(FREE) and not (value is None and key in YOUNGER)
    }


def changes(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one text per key."""
    saved = {**ADDED_SINCE, **saved}
    return [
        f"{key} was {saved.get(key)}, is {wanted.get(key)}"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]


def is_extension(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether `wanted` is the same run, only longer."""
    saved = {**ADDED_SINCE, **saved}
    changed = [key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key)]
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
    """The values of nested mappings under dotted keys; what FREE names whole stays whole."""
    for key, value in config.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in FREE:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
