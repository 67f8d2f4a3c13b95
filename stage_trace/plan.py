"""The memory that a graph will need, phase by phase, from shapes alone: nothing is loaded.

Each phase holds what came before and what it needs itself; the peak is the largest. How many latents fire is known
before the prompt is run only where k says so; otherwise ``L0_GUESS`` stands in. Letters as in ``shared.lm.frozen``:
L layers, T positions, H heads of width E, D = d_model; N active latents, R rows, S columns, B rows of a sweep. Outputs
are the MLPs', and those of attention that a Lorsa stands in for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from shared.basics.units import human_bytes
from shared.lm.families import family_of
from shared.lm.linear_parts import LINEAR_PATHS
from shared.lm.next_token import COPIES, rows_at_once
from shared.sae.config import DictionaryConfig
from shared.sae.variants.lorsa import LorsaConfig
from stage_trace.config import TraceSchema
from stage_trace.influence import ROWS_AT_A_TIME

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32, DOUBLE = 4, 8
L0_GUESS = 64
"""Latents per position and layer of an activation without k."""
ENCODED_AT_ONCE = 1 << 22
"""Pre-activations of one tile of an encoder, as ``shared.kernels`` takes them."""
TILES = 3
"""As many as lie in memory while one is looked at."""
SCORES = 4
"""The same of a Lorsa's scores: scaled, masked, and the patterns."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on, of a language model."""

    parameters: int
    layers: int
    heads: int
    head_width: int
    width: int
    mlp_width: int
    vocabulary: int
    states: int
    """Gradients of the stream that lie in memory at once in the sweep: three where attention's output passes a norm, or
    the branches are parallel."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelShape":
        """Take the shape from a configuration; parameters are counted on a model without memory."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        heads, width = config.num_attention_heads, config.hidden_size
        family, paths = family_of(config), LINEAR_PATHS.get(config.model_type)
        is_parallel = family is not None and family.middle_norm is None
        return cls(
            parameters=sum(one.numel() for one in model.parameters()),  # tied ones are one
            layers=config.num_hidden_layers,
            heads=heads,
            head_width=getattr(config, "head_dim", None) or width // heads,
            width=width,
            mlp_width=config.intermediate_size,
            vocabulary=config.vocab_size,
            states=3 if is_parallel or (paths is not None and paths.output_norm is not None) else 2,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes, by phase and in all; beside Python and its libraries."""

    phases: dict[str, int]
    latents: int
    is_guess: bool = field(default=False)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.phases.values())

    def lines(self) -> list[str]:
        """Return the plan for a terminal."""
        about = "about" if self.is_guess else "at most"
        held = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.phases.items())
        return [f"memory       {human_bytes(self.peak)} at the peak ({held}), for {about} {self.latents:,} features"]


def plan(
    model: ModelShape, dictionaries: Sequence[DictionaryConfig], num_tokens: int, dtype: str, cfg: TraceSchema
) -> Plan:
    """The memory for a prompt of `num_tokens`, with weights, recording and rows of `dtype`."""
    number = BYTES[dtype]
    L, H, E, D, T = model.layers, model.heads, model.head_width, model.width, num_tokens
    latents = sum(map(latents_per_token, dictionaries)) * T
    kept = min(latents, cfg.max_features)
    R, B = kept + cfg.logits.most, min(cfg.batch, kept + cfg.logits.most)
    lorsas = [one for one in dictionaries if isinstance(one, LorsaConfig)]
    outputs = L + len(lorsas)
    others = (2 * outputs + 1) * T + L + 1
    S, final_S = latents + others, kept + others

    weights = number * model.parameters
    patterns, sites = number * L * H * T * T, number * (2 * L + outputs + 2) * T * D
    forward = max(2 * FLOAT32 * H * T * T, 3 * number * T * model.mlp_width) + 4 * number * T * D
    recorded = weights + patterns + sites
    encoding = max(map(partial(_encoding, num_tokens=T), dictionaries), default=0)
    errors = number * outputs * T * D
    attended = max(number, FLOAT32) * sum(one.qk_heads for one in lorsas) * T * T
    facts = (2 * number + 3 * DOUBLE) * latents  # what is known of each latent beside its rows
    held = recorded + errors + facts + attended

    sweep = number * (B * S + T * B * (model.states * D + 4 * E))
    matrix, final = number * R * S, number * R * final_S
    in_double = ROWS_AT_A_TIME * S * (2 * number + 3 * DOUBLE)  # the rows taken, their absolute values, their shares
    again = patterns + sites  # a run of the replacement model, or an intervention, records too
    words = COPIES * FLOAT32 * model.vocabulary * min(T, rows_at_once(model.vocabulary))
    return Plan(
        {
            "model": weights,
            "recording": recorded + forward,
            "dictionaries": held + encoding,
            "rows": held + matrix + max(final, sweep, in_double),
            "scores": held + 2 * final + in_double,
            "runs": held + final + final // number + again + max(forward, encoding, words),
        },
        latents,
        any(one.activation != "topk" for one in dictionaries),
    )


def _encoding(config: DictionaryConfig, num_tokens: int) -> int:
    """What encoding takes: the encoders of a dictionary, one of them in bfloat16 too, and tiles of pre-activations.

    Of a Lorsa its queries and keys too, and the scores of all its heads while they become patterns.
    """
    numbers = config.d_latent * config.widths.d_in // config.num_groups  # of all groups, each reads its own site
    tile = min(ENCODED_AT_ONCE, num_tokens * config.d_latent // config.num_groups)
    if isinstance(config, LorsaConfig):
        heads = 2 * config.qk_heads * config.qk_width * config.widths.d_in
        scores = SCORES * config.qk_heads * num_tokens * num_tokens
        return FLOAT32 * (numbers + heads + max(scores, TILES * tile))
    return FLOAT32 * numbers + 2 * numbers // config.num_groups + TILES * FLOAT32 * tile


def latents_per_token(config: DictionaryConfig) -> int:
    """Return how many of a whole dictionary fire; a guess where no k says so."""
    if config.k is None:
        return L0_GUESS * config.num_groups
    is_each = getattr(config, "k_scope", "all") == "layer"
    return config.k * (config.num_groups if is_each else 1)
