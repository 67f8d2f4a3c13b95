"""Schema of graphs: what ``conf/trace.yaml`` may hold. Types and meanings here, values in ``conf/``.

Imports nothing heavy, so that a wrong key is reported at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

import shared.basics.config
from shared.basics.config import DeviceSchema, ModelInput
from shared.launch.commands import override


class Engine(Enum):
    """What computes the rows."""

    sweep = "sweep"
    """Layer by layer in reverse, without a tape."""
    autograd = "autograd"
    """PyTorch's own backward pass, one per row: slow, the reference."""


@dataclass(kw_only=True)
class Explained:
    """Which logits a graph explains."""

    mass: float = MISSING
    """The fewest next tokens that are this likely together."""
    most: int = MISSING
    """But at most so many."""


@dataclass(kw_only=True)
class Pruning:
    """What of a graph is shown; sums and scores are always over all of it."""

    nodes: float = MISSING
    """Nodes that make up this share of the influence on the logits."""
    edges: float = MISSING
    """Edges that make up this share of what is left."""


@dataclass(kw_only=True)
class TraceSchema:
    """``conf/trace.yaml``."""

    name: str = MISSING
    """Name of the run; its folder is ``run_dir``."""
    run_dir: str = MISSING
    """Folder of the run that the other keys' defaults lie in."""
    out_dir: str = MISSING
    """Where ``graph.json`` and ``graph.html`` go."""
    dictionaries: Any = MISSING
    """Transcoders of the model's MLPs and Lorsas of its attention, at most one of each per layer: folders, folders of
    such, globs, hub ids. What the command line gives without a key stands here."""
    text: str = MISSING
    """The prompt; BOS is put before it."""
    model: ModelInput = field(default_factory=ModelInput)
    device: DeviceSchema = field(default_factory=DeviceSchema)
    logits: Explained = field(default_factory=Explained)
    prune: Pruning = field(default_factory=Pruning)
    max_features: int = MISSING
    """Features with a node of their own; what the others give is counted as error."""
    batch: int = MISSING
    """Rows of one sweep: more is faster, and needs more memory."""
    engine: Engine = MISSING
    """What computes the rows."""
    fixed: int | None = MISSING
    """Take what MLPs add, and attention with a Lorsa, as it is at this many positions from the start. null: at special
    tokens, and at the first position where there is no BOS, as a harvest leaves them out. Special tokens are fixed
    either way."""
    latents: Any = MISSING
    """Folders of ``granary inspect`` whose examples the page shows; null: those called latents in the dictionaries'
    folders or beside them."""
    ablations: int = MISSING
    """How many features the certificate ablates, predicted against actual; 0 leaves it out."""
    ranked: int = MISSING
    """How many features it ablates with everything free, one forward pass each, to rank their influence against what
    the next token's distribution does; 0 leaves that out."""
    dry_run: bool = MISSING
    """Print what memory it will need, and stop before anything is loaded."""


def register() -> None:
    """Put the schemas into Hydra's ConfigStore."""
    shared.basics.config.register()
    ConfigStore.instance().store(name="trace_schema", node=TraceSchema)


def expand_arguments(arguments: Sequence[str]) -> list[str]:
    """``RUN... text=TEXT`` as Hydra takes it: folders as one list, texts and paths quoted whatever they hold."""
    folders, others = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not argument.startswith("-") and (not equals or "/" in key):
            folders.append(argument)
        elif equals and key in ("text", "model", "model.path") and value != "null":
            others.append(override({"model": "model.path"}.get(key, key), value))
        else:
            others.append(argument)
    if folders:
        quoted = ",".join(override("", folder)[1:] for folder in folders)
        others.append(f"dictionaries=[{quoted}]")
    return others
