"""The normalisation of both sides of a dictionary, as what it makes of weights on raw activations.

    W_enc,s' = c_s W_enc,s                b_enc' = b_enc - sum_s W_enc,s' mu_s
    W_dec,t' = W_dec,t / e_t              b_dec,t' = b_dec,t / e_t + nu_t - sum_s W_skip,ts' mu_s
    W_skip,ts' = (c_s / e_t) W_skip,ts

with c and mu the scale and mean of what is read, e and nu of what is written. z stays, hence every latent's value and
threshold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shared.sae.config import DictionaryConfig


@dataclass(frozen=True)
class Sides:
    """Scale and mean of each column, float64."""

    scale_in: Tensor
    """[D_in]."""
    mean_in: Tensor
    scale_out: Tensor
    """[D_out]."""
    mean_out: Tensor

    @classmethod
    def of(cls, config: DictionaryConfig, tensors: Mapping[str, Tensor]) -> Self:
        """Make them from a config and its ``state_dict``; ones and zeros where nothing of it can be folded."""
        if config.normalisation not in ("scale", "centre_scale"):
            d_in, d_out = torch.zeros(config.widths.d_in).double(), torch.zeros(config.widths.d_out).double()
            return cls(d_in + 1, d_in, d_out + 1, d_out)
        side = "input" if config.is_autoencoder else "output"
        return cls(
            _columns(tensors["input_scale"], config.widths.reads),
            tensors["input_mean"],
            _columns(tensors[f"{side}_scale"], config.widths.writes),
            tensors[f"{side}_mean"],
        )

    def written(self, b_dec: Tensor, W_skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """b_dec' and W_skip'."""
        b_dec = b_dec / self.scale_out + self.mean_out
        if W_skip is None:
            return b_dec, None
        W_skip = W_skip * self.scale_in / self.scale_out[:, None]
        return b_dec - W_skip @ self.mean_in, W_skip


def _columns(scale: Tensor, widths: Sequence[int]) -> Tensor:
    """One scale per site as one per column."""
    return torch.cat([one.expand(width) for one, width in zip(scale.reshape(-1), widths, strict=True)])
