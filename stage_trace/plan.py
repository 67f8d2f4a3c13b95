"""The memory that a graph will need, phase by phase, from configurations and file headers alone: nothing is loaded.

Each phase holds what the model needs and what came before; the peak is the largest. How many latents fire is known
before the prompt is run only where k says so; otherwise ``L0_GUESS`` stands in. Letters as in ``shared.lm.frozen``:
L layers, T positions, H heads, D = d_model; N active latents, R rows, S columns, B rows of a sweep.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.basics.units import human_bytes
from shared.lm import load_config, resolve_model
from shared.sae.config import DictionaryConfig
from shared.sae.folder import describe, locate
from shared.sae.loading import KINDS
from stage_trace.config import TraceSchema
from stage_trace.session import Source

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
L0_GUESS = 64
"""Latents per position and layer of an activation without k."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, by phase and in all; beside Python and its libraries."""

    phases: dict[str, int]
    latents: int
    is_guess: bool

    @property
    def peak(self) -> int:
        """Of the largest phase."""
        return max(self.phases.values())

    def lines(self) -> list[str]:
        """For a terminal."""
        about = "about" if self.is_guess else "at most"
        held = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.phases.items())
        return [f"memory       {human_bytes(self.peak)} at the peak ({held}), for {about} {self.latents:,} features"]


def plan(path: str, revision: str | None, sources: Sequence[Source], num_tokens: int, cfg: TraceSchema) -> Plan:
    """The memory for a prompt of `num_tokens`."""
    config = load_config(path, revision)
    of_type = BYTES[cfg.model.dtype.value]
    L, H, D = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
    E = getattr(config, "head_dim", None) or D // H
    T = num_tokens
    weights = sum(map(_parameters, resolve_model(path, revision).glob("*.safetensors"))) * of_type
    recorded = of_type * (L * H * T * T + (3 * L + 2) * T * D)

    configs = [describe(locate(source.name)).config(KINDS) for source in sources]
    firing = {source.name: _firing(one) * T for source, one in zip(sources, configs, strict=True)}
    latents = sum(firing.values())
    one_dictionary = max(4 * one.d_latent * one.widths.d_in // one.num_groups for one in configs)
    written = sum(
        firing[source.name] * len(place.layers) // len(source.places) for source in sources for place in source.places
    )
    stand_ins = of_type * (2 * L * T * D + (latents + written) * D)
    kept = min(latents, cfg.max_features)
    rows, others = kept + cfg.logits.most, (2 * L + 1) * T
    # All columns while rows are made, and beside them the rows in order, of the columns that are kept.
    matrix, final = of_type * rows * (latents + others), of_type * rows * (kept + others)
    batch = min(cfg.batch, rows)
    sweep = of_type * batch * (latents + others + T * 5 * (D + H * E))  # what lies in memory at once, as measured
    masks = 2 * rows * (kept + others)

    base = weights + recorded + stand_ins
    return Plan(
        {
            "model": weights,
            "dictionaries": base + one_dictionary,
            "rows": base + matrix + max(final, sweep),
            "ablations": base + final + masks + recorded + one_dictionary,
        },
        latents,
        any(one.activation != "topk" for one in configs),
    )


def _firing(config: DictionaryConfig) -> int:
    """Latents per token of a whole dictionary."""
    if config.k is None:
        return L0_GUESS * config.num_groups
    is_each = getattr(config, "k_scope", "all") == "layer"
    return config.k * (config.num_groups if is_each else 1)


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
