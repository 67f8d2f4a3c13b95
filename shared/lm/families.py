"""Where the sites of a decoder layer lie, one row per family of models.

A site is the input or the output of a module of the layer. The rows hold for the layers as transformers writes them:

    resid_pre -> [norm] -> attn_in -> attention -> attn_out;   resid_mid  = resid_pre + attn_out
    resid_mid -> [norm] -> mlp_in  -> MLP       -> mlp_out;    resid_post = resid_mid + mlp_out

A sandwich family (Gemma 2 and 3) norms what each branch adds, so that `attn_out` and `mlp_out` lie behind that norm. A
parallel block feeds both branches from `resid_pre` and adds them at once: it has no `resid_mid`. Families that scale
what a branch adds (Granite) or norm only behind it (OLMo 2) have no row: only `resid_pre` and `resid_post` work there.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from shared.lm.modulepoint import Side


class SitePath(NamedTuple):
    """A site of a decoder layer: into or out of the module at a path below the layer."""

    module: str
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where the sites between the two ends of a layer lie."""

    attention: str
    """Path of the attention module; what goes in is `attn_in`."""
    mlp: str = "mlp"
    """Path of the MLP; what goes in is `mlp_in`."""
    attention_adds: str | None = None
    """Path of the module whose output attention adds to the stream, where that is not the attention itself."""
    mlp_adds: str | None = None
    """The same of the MLP."""
    middle_norm: str | None
    """Path of the norm that reads the stream between attention and MLP; None where a block is parallel."""

    def site(self, name: str) -> SitePath | None:
        """Where `name` (of attn_in, attn_out, resid_mid, mlp_in, mlp_out) lies; None where there is no such place."""
        match name:
            case "attn_in":
                return SitePath(self.attention, "input")
            case "attn_out":
                return SitePath(self.attention_adds or self.attention, "output")
            case "resid_mid":
                return None if self.middle_norm is None else SitePath(self.middle_norm, "input")
            case "mlp_in":
                return SitePath(self.mlp, "input")
            case "mlp_out":
                return SitePath(self.mlp_adds or self.mlp, "output")
            case _:
                raise ValueError(f"{name} does not lie inside a layer")


_LLAMA = Family(attention="self_attn", middle_norm="post_attention_layernorm")
_SANDWICH = Family(
    attention="self_attn",
    attention_adds="post_attention_layernorm",
    middle_norm="pre_feedforward_layernorm",
    mlp_adds="post_feedforward_layernorm",
)
_NEOX = Family(attention="attention", middle_norm="post_attention_layernorm")

# By ``model_type``. A row is added with its tiny model in tests/families.py, or tests/vision_language.py for the text
# stack of a vision-language model, which proves the equations above for it.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen3_vl_text": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gpt_neox": _NEOX,
    "gpt2": Family(attention="attn", middle_norm="ln_2"),
    "phi": Family(attention="self_attn", middle_norm=None),
    "phi3": _LLAMA,
    "starcoder2": _LLAMA,
}
_PARALLEL_NEOX = Family(attention="attention", middle_norm=None)


def family_of(config: PretrainedConfig) -> Family | None:
    """The row of a model's family; None where there is none."""
    if config.model_type == "gpt_neox" and config.use_parallel_residual:
        return _PARALLEL_NEOX
    return FAMILIES.get(config.model_type)
