"""The one interchange form of sparse activations, and what a forward pass returns."""

from dataclasses import dataclass, field, replace
from typing import Self

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
class Survey:
    """What the losses of some rows need to know of the whole batch that they are part of."""

    values: torch.Tensor | None = None
    """batchtopk: candidates [N, M] of these rows, among which are all that the batch keeps."""
    indices: torch.Tensor | None = None
    """Their latents; -1 for padding."""
    least: torch.Tensor | None = None
    """The least value that the batch keeps, a scalar."""
    least_multi: torch.Tensor | None = None
    """The same with multi_topk_factor times as many."""
    frequency: torch.Tensor | None = None
    """tanh_quad: the batch's mean of tanh(c f) per latent, [F]."""

    def for_one_row(self) -> Self:
        """For a row that stands in where a rank has none: it picks nothing."""
        if self.values is None or self.indices is None:
            return self
        return replace(self, values=self.values.new_zeros(1, 1), indices=self.indices.new_full((1, 1), -1))


@dataclass(frozen=True, slots=True)
class SAELosses:
    """Loss of one batch: call ``total.backward()``. The parts are detached scalars on the same device."""

    total: torch.Tensor
    reconstruction: torch.Tensor
    fired: torch.Tensor
    """bool [F]: which latents were nonzero on any row."""
    latents: SparseLatents | None = None
    """Detached; None for the activations that train densely."""
    auxk: torch.Tensor | None = None
    multi_topk: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """fvu (ratio of sums), l0; the parts by name. Each is a mean over the batch's tokens."""


@dataclass(frozen=True, slots=True)
class SAEOutput:
    """Reconstruction in the scale of the input, the latents it was made of, and the losses where asked for.

    The properties are OpenSAE's names for the same (its ``SaeForwardOutput``).
    """

    x_hat: torch.Tensor
    latents: SparseLatents
    losses: SAELosses | None = None

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

    @property
    def loss(self) -> torch.Tensor | None:
        """``losses.total``: call its ``backward``."""
        return None if self.losses is None else self.losses.total

    @property
    def reconstruction_loss(self) -> torch.Tensor | None:
        """``losses.reconstruction``."""
        return None if self.losses is None else self.losses.reconstruction

    @property
    def auxk_loss(self) -> torch.Tensor | None:
        """``losses.auxk``; None where it is off or nothing is dead."""
        return None if self.losses is None else self.losses.auxk

    @property
    def multi_topk_loss(self) -> torch.Tensor | None:
        """``losses.multi_topk``; None where it is off."""
        return None if self.losses is None else self.losses.multi_topk

    @property
    def l1_loss(self) -> torch.Tensor | None:
        """The sparsity penalty, before its weight; None where there is none."""
        return None if self.losses is None else self.losses.metrics.get("penalty")
