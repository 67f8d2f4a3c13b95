"""The weights of a decoder that stay when attention patterns and norm factors are frozen and MLPs are taken out.

What is left is linear in the residual stream, and the same in every family of the table below:

    norm:       y = s (x - mean x) w + b      s: the frozen factor of a position; RMSNorm subtracts no mean, has no b
    attention:  y_p = sum_h W_O,h sum_s A_h[p, s] (W_V,h x_s + b_V,h) + b_O         A: the frozen patterns

Shapes: H query heads, K key/value heads, E head dimension, D = d_model, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shared.basics.errors import GranaryError
from shared.lm.families import family_of
from shared.lm.places import decoder_blocks, final_norm, trunk

NORM_TOLERANCE = 1e-2
"""Most relative difference between a norm and the formula above, in the model's own precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPaths:
    """Where the linear parts of a decoder layer lie, below the layer."""

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    output_norm: str | None = None
    """The norm behind attention, where what attention adds passes through one."""
    values: str = "self_attn.v_proj"
    """The projection to values, or to queries, keys and values head by head (`fused`)."""
    output: str = "self_attn.o_proj"
    fused: bool = False


_LLAMA = LinearPaths()
_SANDWICH = LinearPaths(output_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm")
_NEOX = LinearPaths(values="attention.query_key_value", output="attention.dense", fused=True)

# By ``model_type``. tests/unit/trace proves for each that the parts make up the model.
LINEAR_PATHS: dict[str, LinearPaths] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gpt_neox": _NEOX,
}


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm or a LayerNorm, as a scale per position and a linear map."""

    module: nn.Module
    weight_D: Tensor
    bias_D: Tensor | None
    epsilon: float
    is_centred: bool
    """Whether the mean is subtracted first, as LayerNorm does."""

    def scale(self, x: Tensor) -> Tensor:
        """The factor of each position, [..., 1] for x [..., D]; in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.is_centred:
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)

    def apply(self, x: Tensor, scale: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        """The norm's output for a scale that is given, its bias times `gate`; in the type of x."""
        wide = x.to(scale.dtype)
        if self.is_centred:
            wide = wide - wide.mean(-1, keepdim=True)
        y = wide * scale * self.weight_D.to(scale.dtype)
        if self.bias_D is not None:
            y = y + gate * self.bias_D.to(scale.dtype)
        return y.to(x.dtype)

    def pull_back(self, g: Tensor, scale: Tensor) -> Tensor:
        """The gradient of the input, for the gradient `g` of the output."""
        g = g * self.weight_D.to(g.dtype) * scale.to(g.dtype)
        return g - g.mean(-1, keepdim=True) if self.is_centred else g


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention does to values, beside the patterns."""

    values: nn.Linear
    output: nn.Linear
    W_V_KED: Tensor
    b_V_KE: Tensor | None
    W_O_HDE: Tensor
    b_O_D: Tensor | None

    @property
    def per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.W_O_HDE.shape[0] // self.W_V_KED.shape[0]


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """The linear parts of one decoder layer."""

    attention_norm: Norm
    heads: Heads
    output_norm: Norm | None
    mlp_norm: Norm
    is_parallel: bool
    """Both branches read ``resid_pre``."""


@dataclass(frozen=True, slots=True)
class LinearParts:
    """The linear parts of a model."""

    layers: list[LinearLayer]
    final_norm: Norm
    W_U_VD: Tensor

    def logit_vectors(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, D]: what a token's logit reads of the normed stream, less the mean over the vocabulary."""
        W_U_VD = self.W_U_VD
        return W_U_VD[tokens].to(dtype) - W_U_VD.mean(0, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)


def linear_parts(model: PreTrainedModel) -> LinearParts:
    """The linear parts of `model`, views of its weights.

    Raises GranaryError for a family whose parts are not known, for norms that compute something else than the formula,
    and for weights that are quantised.
    """
    config = trunk(model).config
    assert isinstance(config, PretrainedConfig)
    paths = LINEAR_PATHS.get(config.model_type)
    if paths is None:
        raise GranaryError(f"graphs are known for {', '.join(LINEAR_PATHS)}, not for {config.model_type}")
    found = final_norm(model)
    head = model.get_output_embeddings()
    if found is None or not isinstance(head, nn.Linear):
        raise GranaryError(f"{type(model).__name__} has no final norm or no head, so that logits have no graph")
    if head.bias is not None:
        raise GranaryError(f"{type(model).__name__} has a bias on its logits, which graphs do not know")
    family = family_of(config)
    assert family is not None
    is_parallel = family.middle_norm is None
    layers = []
    for block in decoder_blocks(model):
        assert isinstance(block, nn.Module)
        layers.append(
            LinearLayer(
                attention_norm=norm_of(block.get_submodule(paths.attention_norm)),
                heads=_heads(block, paths, config.num_attention_heads),
                output_norm=None if paths.output_norm is None else norm_of(block.get_submodule(paths.output_norm)),
                mlp_norm=norm_of(block.get_submodule(paths.mlp_norm)),
                is_parallel=is_parallel,
            )
        )
    return LinearParts(layers, norm_of(getattr(*found)), head.weight)


def _heads(block: nn.Module, paths: LinearPaths, num_heads: int) -> Heads:
    values, output = block.get_submodule(paths.values), block.get_submodule(paths.output)
    for linear in (values, output):
        if not (isinstance(linear, nn.Linear) and linear.weight.is_floating_point()):
            raise GranaryError("graphs need weights that are not quantised: load the model without quantisation")
    assert isinstance(values, nn.Linear)
    assert isinstance(output, nn.Linear)
    D, width = output.weight.shape
    E = width // num_heads
    W_V: Tensor = values.weight
    b_V: Tensor | None = values.bias
    if paths.fused:
        W_V = W_V.view(num_heads, 3, E, D)[:, 2]
        b_V = None if b_V is None else b_V.view(num_heads, 3, E)[:, 2]
    else:
        W_V = W_V.view(-1, E, D)
        b_V = None if b_V is None else b_V.view(-1, E)
    return Heads(values, output, W_V, b_V, output.weight.view(D, num_heads, E).transpose(0, 1), output.bias)


def norm_of(module: nn.Module) -> Norm:
    """A norm's own weights; raises GranaryError for one that computes something else than the formula."""
    kind = type(module).__name__
    norm = None
    if isinstance(module, nn.LayerNorm):
        norm = Norm(module, module.weight, module.bias, module.eps, is_centred=True)
    elif kind.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        weight: Tensor = module.weight  # type: ignore[assignment]
        epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
        if isinstance(epsilon, float):
            norm = Norm(module, 1 + weight.float() if kind.startswith("Gemma") else weight, None, epsilon, False)
    if norm is None or not _computes(module, norm):
        raise GranaryError(f"graphs know RMSNorm and LayerNorm, and {kind} is neither")
    return norm


@torch.no_grad()
def _computes(module: nn.Module, norm: Norm) -> bool:
    """Whether the formula gives what the module gives."""
    D = len(norm.weight_D)
    x = torch.linspace(-1, 2, 3 * D, device=norm.weight_D.device, dtype=next(module.parameters()).dtype).view(3, D)
    x = torch.sin(7 * x) * x
    expected, found = module(x), norm.apply(x, norm.scale(x))
    return bool((expected - found).norm() <= NORM_TOLERANCE * expected.norm())
