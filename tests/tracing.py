"""A small random model of every family that graphs know, with a transcoder of each of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shared.lm.attention import heads_of, shape_of
from shared.lm.frozen import Recording
from shared.lm.linear_parts import LINEAR_PATHS, LinearParts, linear_parts
from shared.sae import CLT, Dictionary, Lorsa, Transcoder
from shared.sae.sites import Sites
from shared.sae.variants.clt import CLTConfig
from shared.sae.variants.lorsa import LorsaConfig
from shared.sae.variants.skip_transcoder import SkipTranscoder, SkipTranscoderConfig
from shared.sae.variants.transcoder import TranscoderConfig
from stage_trace.leaves import Columns
from stage_trace.places import places_of
from stage_trace.replacement import Replacement
from stage_trace.session import Session, Source, record
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
    kind, config_kind = (SkipTranscoder, SkipTranscoderConfig) if skip else (Transcoder, TranscoderConfig)
    config = config_kind(
        d_in=width, d_out=width, d_latent=latents, k=k, activation=activation, pre_bias=False, sites=sites
    )
    made = kind(config, generator=generator)

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
        if isinstance(made, SkipTranscoder):
            made.W_skip.copy_(0.2 * draw(width, width))
    return made.requires_grad_(False)


def make_clt(
    layers: int, *, activation: str = "batchtopk", width: int = D, latents: int = 16, tying: str = "none"
) -> CLT:
    """A random CLT of a model's first layers, `latents` in each."""
    names = range(layers)
    sites = Sites(tuple(f"layers.{n}.mlp_in" for n in names), tuple(f"layers.{n}.mlp_out" for n in names))
    each = (width,) * layers
    config = CLTConfig(
        read_widths=each, write_widths=each, d_latent=layers * latents, k=K if activation == "batchtopk" else None,
        activation=activation, pre_bias=False, tying=tying, sites=sites,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    made = CLT(config, generator=generator)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith("threshold"):
                value.fill_(1.0)
            elif "scale" in name:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.7)
            elif not name.endswith("W_enc"):
                value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return made.requires_grad_(False)


def make_lorsa(
    layer: int, *, activation: str = "topk", width: int = D, latents: int = F, k: int = K, **form: object
) -> Lorsa:
    """Random, of two heads, with a normalisation of both sides and biases that are none of 0 and 1."""
    generator = torch.Generator().manual_seed(100 + layer)
    sites = Sites((f"layers.{layer}.attn_in",), (f"layers.{layer}.attn_out",), unit="sequence")
    shape = {"qk_heads": 2, "qk_width": 6, "scale": 0.4, "frequencies": (1.0, 0.3), **form}
    config = LorsaConfig(
        d_in=width, d_out=width, d_latent=latents, k=k if activation in ("topk", "batchtopk") else None,
        activation=activation, pre_bias=False, sites=sites, **shape,  # type: ignore[arg-type]
    )  # fmt: skip
    made = Lorsa(config, generator=generator)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith("threshold"):
                value.fill_(0.9 if activation == "batchtopk" else -0.5)
            elif name.endswith("_scale"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.7)
            elif name == "b_enc" or not name.startswith(("W_", "norm_")):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return made.requires_grad_(False)


def exact_lorsa(model: PreTrainedModel, layer: int) -> Lorsa:
    """One whose output is the attention's own: of every feature of a head's values a latent for each of its signs."""
    heads, shape = heads_of(model, layer), shape_of(model, layer)
    W_O_HDE = linear_parts(model).layers[layer].heads.W_O_HDE.float()
    H, _, width = heads.W_V_HED.shape
    sites = Sites((f"layers.{layer}.attn_in",), (f"layers.{layer}.attn_out",), unit="sequence")
    config = LorsaConfig(
        d_in=width, d_out=width, d_latent=2 * H * shape.width, k=None, activation="relu", normalisation="none",
        pre_bias=False, unit_norm_decoder=False, sites=sites, qk_heads=H, qk_width=shape.width, scale=shape.form.scale,
        frequencies=shape.form.frequencies, rope_scale=shape.form.rope_scale,
    )  # fmt: skip
    made = Lorsa(config).requires_grad_(False)
    for name, tensor in zip(("W_Q", "b_Q", "W_K", "b_K"), heads.query_key.tensors(), strict=False):
        made.get_parameter(name).copy_(tensor)
    made.W_enc.copy_(torch.cat([heads.W_V_HED, -heads.W_V_HED], 1).flatten(0, 1))
    made.W_dec.copy_(torch.cat([W_O_HDE.transpose(1, 2), -W_O_HDE.transpose(1, 2)], 1).flatten(0, 1))
    return made


@dataclass
class Traced:
    """A prompt as far as it needs to be for rows."""

    session: Session
    model: PreTrainedModel
    parts: LinearParts
    tokens_T: Tensor
    recording: Recording
    replacement: Replacement
    columns: Columns
    dictionaries: list[Dictionary]


def make_traced(family: str, dtype: torch.dtype = torch.float64, **kwargs: object) -> Traced:
    """With a transcoder of every layer, made by `make_transcoder` with `kwargs`."""
    model = make_model(family, dtype)
    depth = int(model.config.num_hidden_layers)
    return of_dictionaries(model, [make_transcoder(layer, **kwargs) for layer in range(depth)])  # type: ignore[arg-type]


def of_dictionaries(model: PreTrainedModel, dictionaries: Sequence[Dictionary]) -> Traced:
    """A prompt of six tokens, of which the first is fixed."""
    tokens_T = torch.randint(3, 50, (T,), generator=torch.Generator().manual_seed(1))
    sources = [Source("it", places_of(one.config, "it"), partial(_itself, one)) for one in dictionaries]
    session = record(model, sources, tokens_T, torch.arange(T) == 0)
    return Traced(
        session, model, session.parts, tokens_T, session.recording, session.replacement, session.columns,
        list(dictionaries),
    )  # fmt: skip


def _itself(dictionary: Dictionary) -> Dictionary:
    return dictionary


assert {FAMILIES[name]().model_type for name in TRACED} <= set(LINEAR_PATHS)


def bundled_transcoder(layer: int, *, skip: bool = False, threshold: float = 1.6) -> Transcoder:
    """Random, on the bundled model's width; a threshold of 1.6 leaves some 5 of 96 latents active."""
    made = make_transcoder(layer, activation="batchtopk", width=128, latents=96, skip=skip)
    made.input_mean.zero_()
    made.activation.threshold.fill_(threshold)  # type: ignore[operator]
    made.W_enc.data.mul_(0.6)
    made.b_enc.data.mul_(0.5)
    return made


def bundled_lorsa(layer: int) -> Lorsa:
    """Random, on the bundled model's width; 4 of 64 latents are active."""
    return make_lorsa(layer, width=128, latents=64, k=4)
