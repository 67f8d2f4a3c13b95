"""From the residual stream to the logits: the final norm and the output embedding of a model, without its layers."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from shared.lm.identity import load_trunk_config
from shared.lm.load import load_part, truncate_config
from shared.lm.places import final_norm


@dataclass(frozen=True)
class LogitHead:
    """What a direction in the stream after the last layer adds to the logits, per unit of the norm's RMS."""

    W_VD: Tensor
    """Output embedding, float32."""
    gain_D: Tensor
    """What the final norm multiplies each feature by."""
    is_centred: bool
    """Whether the norm also takes off the mean over the features (LayerNorm)."""

    def weights(self, directions_ND: Tensor) -> Tensor:
        """[N, V]: W (gain * d), minus its mean over the vocabulary, which no probability depends on."""
        d_ND = directions_ND.to(self.W_VD)
        if self.is_centred:
            d_ND = d_ND - d_ND.mean(1, keepdim=True)
        logits_NV = (d_ND * self.gain_D) @ self.W_VD.T
        return logits_NV - logits_NV.mean(1, keepdim=True)


def head_size(path: str, revision: str | None = None) -> tuple[int, int]:
    """Bytes that `load_head` takes at most, and V; reads the model's configuration only."""
    auto_class, config = _of_one_layer(path, revision)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    size = sum(4 * weight.numel() for weight in model.parameters())
    return size, len(model.get_output_embeddings().weight)


def load_head(path: str, revision: str | None = None, *, device: torch.device | str = "cpu") -> LogitHead:
    """The head of the model at `path`; only one of its layers is read with it, and the tower of one that reads images.

    Raises as `load_causal_lm`.
    """
    auto_class, config = _of_one_layer(path, revision)
    model = load_part(auto_class, path, config, "float32", revision, "eager")
    W_VD = model.get_output_embeddings().weight.detach().float()
    holder = final_norm(model)
    gain_D, is_centred = torch.ones(W_VD.shape[1]), False
    if holder is not None:
        norm = getattr(*holder).float()
        # Two inputs of RMS 1, of opposite sign, tell the gain of any norm, however it spells it (Gemma's is 1 + w).
        signs_D = torch.ones(W_VD.shape[1])
        signs_D[1::2] = -1
        with torch.inference_mode():
            gain_D = (norm(signs_D[None])[0] - norm(-signs_D[None])[0]) / (2 * signs_D)
            is_centred = bool(
                norm(torch.ones_like(signs_D)[None]).sub(norm(-torch.ones_like(signs_D)[None])).abs().max() < 1e-3
            )
    return LogitHead(W_VD.to(device), gain_D.clone().to(device), is_centred)


def _of_one_layer(path: str, revision: str | None) -> tuple[Any, PretrainedConfig]:
    """What makes the model, and its configuration with one layer of text."""
    config = copy.deepcopy(load_trunk_config(path, revision))
    text = config.get_text_config(decoder=True)
    truncate_config(text, 1)
    return AutoModelForCausalLM if text is config else AutoModelForImageTextToText, config
