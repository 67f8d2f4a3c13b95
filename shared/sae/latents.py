"""The one interchange form of sparse activations, and what a forward pass returns."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SparseLatents:
    """Active latents of each token.

    A slot with index -1 is padding and its value is 0; the others fired. Leading dimensions are those of the input.
    Activations with k latents per token have K = k slots, the others as many as the fullest token of the batch.
    """

    values: torch.Tensor
    """float32 [..., K]."""
    indices: torch.Tensor
    """int64 [..., K]."""
    token_mean: torch.Tensor | None = None
    """[..., 1], under layer_norm only: what decode adds back."""
    token_scale: torch.Tensor | None = None
    """[..., 1], under layer_norm only: what decode multiplies by."""
    skipped: torch.Tensor | None = None
    """[..., D_out], of a dictionary with a skip only: what reaches the output past the latents, which decode adds."""
    read: torch.Tensor | None = None
    """[..., D_in], of a dictionary whose latents are maps only: the normalised input, which decode maps."""
    all_features: torch.Tensor | None = None
    """[..., F], where ``encode`` was asked for it: the positive pre-activations, before the activation selects."""

    # OpenSAE's names for the same.

    @property
    def sparse_feature_activations(self) -> torch.Tensor:
        """``values``."""
        return self.values

    @property
    def sparse_feature_indices(self) -> torch.Tensor:
        """``indices``."""
        return self.indices

    @property
    def input_mean(self) -> torch.Tensor | None:
        """``token_mean``."""
        return self.token_mean

    @property
    def input_std(self) -> torch.Tensor | None:
        """``token_scale``: over d and with epsilon, where OpenSAE's is over d - 1 and without."""
        return self.token_scale

    def to_dense(self, num_latents: int) -> torch.Tensor:
        """[..., F]: for looking at; nothing in training calls it."""
        kept = self.values.masked_fill(self.indices < 0, 0)
        dense = kept.new_zeros(*kept.shape[:-1], num_latents)
        return dense.scatter_add_(-1, self.indices.clamp_min(0), kept)


@dataclass(frozen=True, slots=True)
class SAEOutput:
    """Reconstruction in the scale of what is written, and the latents it was made of.

    The properties are OpenSAE's names for the same (its ``SaeForwardOutput``).
    """

    x_hat: torch.Tensor
    latents: SparseLatents

    @property
    def sae_output(self) -> torch.Tensor:
        """``x_hat``."""
        return self.x_hat

    @property
    def sparse_feature_activations(self) -> torch.Tensor:
        """``latents.values``."""
        return self.latents.values

    @property
    def sparse_feature_indices(self) -> torch.Tensor:
        """``latents.indices``."""
        return self.latents.indices

    @property
    def all_features(self) -> torch.Tensor | None:
        """``latents.all_features``."""
        return self.latents.all_features

    @property
    def input_mean(self) -> torch.Tensor | None:
        """``latents.token_mean``."""
        return self.latents.token_mean

    @property
    def input_std(self) -> torch.Tensor | None:
        """``latents.token_scale``."""
        return self.latents.token_scale
