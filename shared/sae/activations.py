"""Which latents fire: the registry of activation functions.

An activation is a module, so that it may own parameters (thresholds) and buffers; they are saved with the SAE under
``activation.*``. Shapes: N rows, D d_model, F latents, K picks per row.
"""

from typing import Protocol

import torch
from torch import nn

from shared.kernels import encode_topk


class Encoder(Protocol):
    """What an activation sees of the SAE."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    kernels: str
    compute_dtype: str


class TopK(nn.Module):
    """The k largest positive pre-activations of each token (Makhzani and Frey 2013; Gao et al. 2024)."""

    def select(self, encoder: Encoder, centred_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [N, K] in descending order and int64 indices [N, K], -1 where nothing fires. No gradient."""
        return encode_topk(
            centred_ND,
            encoder.W_enc,
            encoder.b_enc,
            k,
            kernels=encoder.kernels,
            compute_dtype=encoder.compute_dtype,
        )


ACTIVATIONS: dict[str, type[TopK]] = {"topk": TopK}
