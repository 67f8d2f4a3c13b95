"""The meeting point of all formats: a TopK SAE on raw activations, its normalisation folded into its weights.

    f = topk(W_enc (x - b_dec if pre_bias else x) + b_enc),   x^ = sum_i f_i W_dec[i] + b_dec

With `layer_norm`, x is first brought to mean 0 and (biased) standard deviation 1 per token, and x^ scaled back where
`shift_back`. Folding keeps every latent's value.

Legend: F d_latent, D d_model.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from shared.errors import GranaryError
from shared.sae.config import SAEConfig
from shared.sae.model import SAE


@dataclass(frozen=True)
class RawSAE:
    """Weights, float32, row per latent."""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    k: int
    pre_bias: bool
    layer_norm: bool = False
    shift_back: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)
    """``hook`` where it is known, and whatever the source records."""

    @classmethod
    def from_sae(cls, sae: SAE, provenance: dict[str, Any]) -> Self:
        """Fold the normalisation; raises GranaryError for an activation other than TopK."""
        config = sae.config
        if config.activation != "topk":
            raise GranaryError(f"an SAE with activation {config.activation} has no form in other formats yet")
        W_enc, b_enc = sae.W_enc.detach().double(), sae.b_enc.detach().double()
        W_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
        if config.normalisation in ("scale", "centre_scale"):
            scale, mean = float(sae.input_scale), sae.input_mean.double()
            W_enc, W_dec, b_dec = W_enc * scale, W_dec / scale, b_dec / scale + mean
            if not config.pre_bias:  # with it, the new b_dec takes the mean off
                b_enc = b_enc - W_enc @ mean
        return cls(
            W_enc.float(),
            b_enc.float(),
            W_dec.float(),
            b_dec.float(),
            k=config.k or 0,
            pre_bias=config.pre_bias,
            layer_norm=config.normalisation == "layer_norm",
            shift_back=config.shift_back,
            provenance=dict(provenance),
        )

    def to_sae(self) -> SAE:
        """An SAE of this project with these weights."""
        d_latent, d_model = self.W_enc_FD.shape
        config = SAEConfig(
            d_model=d_model,
            d_latent=d_latent,
            k=self.k,
            normalisation="layer_norm" if self.layer_norm else "none",
            shift_back=self.shift_back,
            pre_bias=self.pre_bias,
        )
        with torch.device("meta"):
            sae = SAE(config)
        tensors = {
            "W_enc": self.W_enc_FD,
            "b_enc": self.b_enc_F,
            "W_dec": self.W_dec_FD,
            "b_dec": self.b_dec_D,
            "input_mean": torch.zeros(d_model),
            "input_scale": torch.ones(()),
            "input_variance": torch.ones(d_model),
        }
        sae.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
        return sae

    def with_pre_bias(self, pre_bias: bool) -> "RawSAE":
        """The same function with `pre_bias` as asked: the difference goes into b_enc."""
        if self.pre_bias == pre_bias:
            return self
        shift_F = (self.W_enc_FD.double() @ self.b_dec_D.double()).float()
        return replace(self, b_enc_F=self.b_enc_F + (shift_F if pre_bias else -shift_F), pre_bias=pre_bias)

    def without_layer_norm(self, form: str) -> "RawSAE":
        """Itself; raises GranaryError where the target `form` has no per-token normalisation."""
        if self.layer_norm:
            raise GranaryError(f"the {form} format has no layer_norm: per-token scales can't be folded into weights")
        return self

    def with_sample_std(self, *, scale_output: bool) -> "RawSAE":
        """Weights for a per-token standard deviation over d - 1 (torch's default) in place of this project's over d."""
        ratio = sample_std_ratio(self.W_enc_FD.shape[1])
        return self._rescaled(ratio, scale_output)

    def from_sample_std(self, *, scale_output: bool) -> "RawSAE":
        """The inverse of `with_sample_std`."""
        return self._rescaled(1 / sample_std_ratio(self.W_enc_FD.shape[1]), scale_output)

    def _rescaled(self, ratio: float, scale_output: bool) -> "RawSAE":
        """Weights for inputs divided by `ratio`; and for outputs multiplied by it, if `scale_output`."""
        if not scale_output:
            raw = self.with_pre_bias(False)
            return replace(raw, W_enc_FD=raw.W_enc_FD * ratio)
        return replace(
            self,
            W_enc_FD=self.W_enc_FD * ratio,
            W_dec_FD=self.W_dec_FD / ratio,
            b_dec_D=self.b_dec_D / ratio,
        )


def sample_std_ratio(width: int) -> float:
    """Standard deviation over d - 1 divided by that over d."""
    if width < 2:
        raise GranaryError("a per-token standard deviation needs at least 2 dimensions")
    return math.sqrt(width / (width - 1))
