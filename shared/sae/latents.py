"""The one interchange form of sparse activations, and what a forward pass returns."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class SparseLatents:
    """Active latents of each token.

    A slot with index -1 is padding and its value is 0; the others fired. Leading dimensions are those of the input.
    """

    values: torch.Tensor
    """float32 [..., K]."""
    indices: torch.Tensor
    """int64 [..., K]."""
    token_mean: torch.Tensor | None = None
    """[..., 1], under layer_norm only: what decode adds back."""
    token_scale: torch.Tensor | None = None
    """[..., 1], under layer_norm only: what decode multiplies by."""

    def to_dense(self, num_latents: int) -> torch.Tensor:
        """[..., F]: for looking at; nothing in training calls it."""
        kept = self.values.masked_fill(self.indices < 0, 0)
        dense = kept.new_zeros(*kept.shape[:-1], num_latents)
        return dense.scatter_add_(-1, self.indices.clamp_min(0), kept)


@dataclass(frozen=True, slots=True)
class SAEOutput:
    """Reconstruction in the scale of the input, and the latents it was made of."""

    x_hat: torch.Tensor
    latents: SparseLatents


@dataclass(frozen=True, slots=True)
class SAELosses:
    """Loss of one batch: call ``total.backward()``. The parts are detached scalars on the same device."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    latents: SparseLatents
    """Detached."""
    auxk: torch.Tensor | None = None
    multi_topk: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """fvu (ratio of sums), l0; the parts by name. Each is a mean over the batch's tokens."""
