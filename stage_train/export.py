"""The finished SAE as a checkpoint folder that anyone can load, with a record of where it comes from."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shared.sae import SAE
from stage_train.frozen import FrozenStore

log = logging.getLogger(__name__)


def provenance(
    stores: Sequence[FrozenStore], hook: str, identity: Mapping[str, Any], steps: int, tokens: int
) -> dict[str, Any]:
    """What made the weights: model, activations, hook, configuration, length, software."""
    first = stores[0].store.plan.provenance
    text = json.dumps(dict(identity), sort_keys=True)
    return {
        "hook": hook,
        "model": first.get("model"),
        "seq_len": stores[0].store.seq_len,
        "stores": [part.record() | {"shards": len(part.shards)} for part in stores],
        "seed": identity["seed"],
        "config": dict(identity),
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
        "steps": steps,
        "tokens": tokens,
        "versions": {"granary": version("granary"), "torch": torch.__version__},
    }


def is_exported(folder: Path) -> bool:
    """Whether the folder holds an exported SAE."""
    return (folder / "config.json").is_file() and (folder / "sae.safetensors").is_file()


def export(sae: SAE, folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``sae.safetensors``."""
    sae.save_pretrained(folder, dict(record))
