"""A small random model of every family that graphs know, with a transcoder of each of its layers."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shared.lm.frozen import Recording, run
from shared.lm.hookpoint import HookPoint
from shared.lm.linear_parts import LINEAR_PATHS, LinearParts, linear_parts
from shared.sae import Transcoder
from shared.sae.sites import Sites
from shared.sae.variants.transcoder import TranscoderConfig
from stage_trace.leaves import Columns
from stage_trace.replacement import Place, Replacement, replace_layer
from tests.families import FAMILIES

TRACED = tuple(FAMILIES)
D, F, K, T = 16, 32, 2, 6


def make_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Random weights, biases and norms included, so that nothing is zero by chance."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager")
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        centre = 1.0 if is_norm and not family.startswith("gemma") else 0.0
        parameter.data.normal_(std=0.3).add_(centre)
    return model.eval().requires_grad_(False).to(dtype)


def make_transcoder(
    layer: int, *, read: str = "mlp_in", activation: str = "topk", skip: bool = False, width: int = D, latents: int = F
) -> Transcoder:
    """Random, with a normalisation of both sides that is none of 0 and 1."""
    generator = torch.Generator().manual_seed(layer)
    sites = Sites((f"layers.{layer}.{read}",), (f"layers.{layer}.mlp_out",))
    k = K if activation in ("topk", "batchtopk") else None
    config = TranscoderConfig(
        d_in=width, d_out=width, d_latent=latents, k=k, activation=activation, pre_bias=False, sites=sites
    )
    made = Transcoder(config, generator=generator)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        made.b_enc.copy_(0.2 * draw(latents) - (0.0 if k else 1.0))
        made.b_dec.copy_(draw(width))
        made.input_mean.copy_(draw(width))
        made.output_mean.copy_(draw(width))
        made.input_scale.fill_(1.7)
        made.output_scale.fill_(0.6)
        for name, value in made.activation.state_dict().items():
            value.copy_(torch.tensor(0.9) if name == "threshold" else 0.1 * draw(*value.shape))
    if skip:
        made.register_buffer("W_skip", 0.2 * draw(width, width))
    return made.requires_grad_(False)


@dataclass
class Traced:
    """A prompt as far as it needs to be for rows."""

    model: PreTrainedModel
    parts: LinearParts
    tokens_T: Tensor
    recording: Recording
    replacement: Replacement
    columns: Columns
    dictionaries: list[Transcoder]


def make_traced(family: str, dtype: torch.dtype = torch.float64, *, length: int = T, **kwargs: object) -> Traced:
    """The first position is fixed; `kwargs` are those of `make_transcoder`."""
    model = make_model(family, dtype)
    parts = linear_parts(model)
    depth = len(parts.layers)
    tokens_T = torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(1))
    dictionaries = [make_transcoder(layer, **kwargs) for layer in range(depth)]  # type: ignore[arg-type]
    places = [Place.of(one.sites, "it") for one in dictionaries]
    sites = [place.read for place in places] + [HookPoint(layer, "attn_in") for layer in range(depth)]
    with torch.no_grad():
        recording = run(model, parts, tokens_T, sites)
    fixed_T = torch.arange(length) == 0
    layers = [replace_layer(one, place, recording, fixed_T) for one, place in zip(dictionaries, places, strict=True)]
    replacement = Replacement(layers, fixed_T)
    return Traced(model, parts, tokens_T, recording, replacement, Columns.of(replacement), dictionaries)


assert {FAMILIES[name]().model_type for name in TRACED} <= set(LINEAR_PATHS)


def bundled_transcoder(layer: int, *, skip: bool = False, threshold: float = 1.6) -> Transcoder:
    """Random, on the bundled model's width; a threshold of 1.6 leaves some 5 of 96 latents active."""
    made = make_transcoder(layer, activation="batchtopk", width=128, latents=96, skip=skip)
    made.input_mean.zero_()
    made.activation.threshold.fill_(threshold)  # type: ignore[operator]
    made.W_enc.data.mul_(0.6)
    made.b_enc.data.mul_(0.5)
    return made
