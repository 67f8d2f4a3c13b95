"""The attention of one layer of a language model: how its queries and keys become patterns, and its heads' weights.

Everything is taken from the layer's own modules, so that a pattern made from it is the model's. Shapes: H query heads,
E their width, D what is read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.kernels.attention import Form, QueryKey
from shared.lm.families import family_of
from shared.lm.identity import load_config
from shared.lm.linear_parts import norm_of
from shared.lm.load import load_trunk
from shared.lm.places import decoder_blocks, trunk
from shared.lm.rope import BY_LENGTH

# By ``model_type``: their attention has q_proj, k_proj, v_proj, o_proj and is what ``shared.kernels.attention`` says.
# tests/unit/lm proves it for each.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the configuration says of a layer's attention."""

    heads: int
    """Query heads."""
    width: int
    """Of a head."""
    form: Form


@dataclass(frozen=True, slots=True)
class ModelHeads:
    """The weights of a layer's query heads, float32; of a key/value head that several share, a copy for each."""

    query_key: QueryKey
    W_V_HED: Tensor


def attention_shape(path: str, revision: str | None, layer: int) -> AttentionShape:
    """That of a model's layer, from its configuration alone; raises GranaryError for a family that is not known."""
    config = load_config(path, revision)
    _check_known(path, config.model_type)
    if layer >= config.num_hidden_layers:
        raise GranaryError(f"model {path} has {config.num_hidden_layers} layers, layers.{layer} is none of them")
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="eager")
    return shape_of(model, layer)


def model_heads(path: str, revision: str | None, layer: int) -> ModelHeads:
    """The heads of a model's layer; loads the model as far as that layer, in float32. Raises as `attention_shape`."""
    _check_known(path, load_config(path, revision).model_type)
    return heads_of(load_trunk(path, "float32", num_layers=layer + 1, last_mlp=False, revision=revision), layer)


def shape_of(model: PreTrainedModel, layer: int) -> AttentionShape:
    """That of a layer of `model`, whose weights are not looked at. Raises GranaryError for what is not known."""
    body: Any = trunk(model)
    config, attention = body.config, _attention(model, layer)
    _check_known(type(model).__name__, config.model_type)
    if not attention.is_causal:
        raise GranaryError(f"{type(model).__name__} attends to later positions, which no lorsa does")
    rotary: Any = type(body.rotary_emb)(config)  # on the CPU, with values
    kind = f"{attention.layer_type}_" if isinstance(rotary.rope_type, dict) else ""
    rope_type = rotary.rope_type[attention.layer_type] if kind else rotary.rope_type
    if rope_type in BY_LENGTH:
        raise GranaryError(f"{type(model).__name__} has {rope_type} RoPE, which depends on the longest sequence")
    norm = getattr(attention, "q_norm", None)
    form = Form(
        scale=float(attention.scaling),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=getattr(attention if hasattr(attention, "sliding_window") else config, "sliding_window", None),
        frequencies=tuple(getattr(rotary, f"{kind}inv_freq").tolist()),
        rope_scale=float(getattr(rotary, f"{kind}attention_scaling")),
        norm_eps=None if norm is None else float(getattr(norm, "variance_epsilon", None) or norm.eps),
    )
    return AttentionShape(config.num_attention_heads, attention.head_dim, form)


@torch.no_grad()
def heads_of(model: PreTrainedModel, layer: int) -> ModelHeads:
    """The heads of a layer of `model`."""
    attention, shape = _attention(model, layer), shape_of(model, layer)

    def split(linear: nn.Linear) -> tuple[Tensor, Tensor]:
        W_hED = linear.weight.float().unflatten(0, (-1, shape.width))
        bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.float()
        b_hE = bias.unflatten(0, (-1, shape.width))
        copies = shape.heads // len(W_hED)
        return W_hED.repeat_interleave(copies, 0), b_hE.repeat_interleave(copies, 0)

    norms = [
        norm_of(norm).weight_D.float().expand(shape.heads, -1)
        for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        if norm is not None
    ]
    query_key = QueryKey(*split(attention.q_proj), *split(attention.k_proj), *norms)
    return ModelHeads(query_key, split(attention.v_proj)[0])


def _check_known(model: str, model_type: str) -> None:
    if model_type not in KNOWN:
        raise GranaryError(
            f"a lorsa knows the attention of {', '.join(KNOWN)}, not that of {model} ({model_type}): give "
            "variant.attention=plain, with variant.qk_heads and variant.qk_width"
        )


def _attention(model: PreTrainedModel, layer: int) -> Any:
    body: Any = trunk(model)
    family = family_of(body.config)
    assert family is not None
    return decoder_blocks(model)[layer].get_submodule(family.attention)
