"""From a training checkpoint to an SAE that anyone can load, with a record of where it comes from."""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from shared.basics.errors import GranaryError
from shared.basics.run_folder import RunFolder
from shared.basics.versions import software_versions
from shared.launch import commands
from shared.launch.outcome import ending_in_one_line
from shared.launch.terminal import ShownFormatter
from shared.sae import folder as on_disk
from shared.sae.loading import KINDS
from shared.sae.sites import Sites
from shared.sae.variants import VARIANTS
from shared.sae.variants.clt_part import Cut
from stage_train.state.checkpoint import intact_checkpoint, read_state
from stage_train.state.pieces import Pieces
from stage_train.state.tensor_files import load_tensors

log = logging.getLogger(__name__)

# Elements of a tensor that are in memory at a time: 64 MiB.
BLOCK_ELEMENTS = 1 << 24


def provenance(
    origin: Mapping[str, Any], sites: Sites, identity: Mapping[str, Any], steps: int, tokens: int
) -> dict[str, Any]:
    """What made the weights: the `origin` of the activations, sites, configuration, length, software."""
    return {
        **sites.record(),
        **origin,
        "seed": identity["seed"],
        "config": dict(identity),
        "config_hash": digest(identity),
        "steps": steps,
        "tokens": tokens,
        "versions": software_versions("torch"),
    }


def export(checkpoint: Path, folder: Path) -> None:
    """Write ``config.json`` and ``sae.safetensors`` from a training checkpoint, whatever layout wrote it.

    One process does it, a block of rows at a time. Raises GranaryError when the checkpoint does not load.
    """
    state = read_state(checkpoint)
    saved = on_disk.from_document(state["sae"], state["provenance"])
    config = saved.config(KINDS)
    with torch.device("meta"):
        dictionary = VARIANTS[config.kind](config)
    roles, shapes = dictionary.roles(), dictionary.state_dict()
    averaged = {name for name, role in roles.items() if role.learnt} if state.get("export_average") else set()

    def fetch(name: str) -> Iterator[torch.Tensor]:
        for block in saved_rows(checkpoint, f"{'ema' if name in averaged else 'sae'}.{name}", shapes[name]):
            if name in averaged and roles[name].unit_rows:  # an average of unit vectors is shorter
                block.div_(block.norm(dim=1, keepdim=True))
            yield block

    on_disk.save(folder, config, shapes, saved.training, saved.provenance, fetch=fetch)


def saved_rows(checkpoint: Path, name: str, whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor of a checkpoint, of the type and shape of `whole`, block of rows after block."""
    shape = tuple(whole.shape)
    if not shape:
        scalar = torch.empty((), dtype=whole.dtype)
        load_tensors(checkpoint, {name: scalar})
        yield scalar
        return
    rows = max(1, BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    for first in range(0, shape[0], rows):
        block = torch.empty(min(rows, shape[0] - first), *shape[1:], dtype=whole.dtype)
        load_tensors(checkpoint, {name: Pieces(block, Cut(shape, 0, ((first, len(block)),)))})
        yield block


def run_id(folder: Path, identity: Mapping[str, Any]) -> str:
    """A name for the run that is the same whenever it is continued."""
    return digest({"folder": str(folder.resolve()), **identity})[:16]


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping, in hexadecimal."""
    return hashlib.sha256(json.dumps(dict(value), sort_keys=True).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m stage_train.export RUN_FOLDER [TARGET]``: export the newest checkpoint of a run."""
    parser = argparse.ArgumentParser(prog=commands.program("export"), description="Export the newest checkpoint.")
    parser.add_argument("run", type=Path, help="out_dir of a training run")
    parser.add_argument("target", type=Path, nargs="?", help="where to write; default: the run's folder")
    options = parser.parse_args(arguments)
    console = logging.StreamHandler()
    console.setFormatter(ShownFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console])
    with ending_in_one_line():
        newest = intact_checkpoint(RunFolder(options.run).checkpoints)
        if newest is None:
            raise GranaryError(
                f"there is no checkpoint in {RunFolder(options.run).checkpoints}: give the out_dir of a run"
            )
        target = options.target or options.run
        export(newest, target)
        log.info("exported %s to %s", newest, target)


if __name__ == "__main__":
    main()
