"""Which latents fire: the registry of activation functions.

An activation is a module, so that it may own parameters (per-latent thresholds) and buffers; they are saved with the
SAE under ``activation.*``. All of them map the encoder's pre-activations z = W_enc (x~ - b_dec) + b_enc to latents:

    topk        the k largest positive z of each token                             Gao et al. 2024, 2406.04093
    batchtopk   in training the N k largest positive z, later z > threshold        Bussmann et al. 2024, 2412.06410
    relu        max(z, 0)
    jumprelu    z where z > theta, theta = exp(log_threshold) per latent           Rajamanoharan et al. 2024, 2407.14435
    gated       max(exp(r_mag) (z - b_enc) + b_mag, 0) where z > 0                 Rajamanoharan et al. 2024, 2404.16014

Shapes: N rows, D d_model, F latents held, K picks per row.
"""

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from shared.kernels import Compute, encode_threshold, encode_topk
from shared.sae.straight_through import jump_relu

if TYPE_CHECKING:
    from shared.sae.config import SAEConfig


class Encoder(Protocol):
    """What an activation sees of the SAE."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter

    @property
    def compute(self) -> Compute:
        """How the products are made."""


class Activation(nn.Module):
    """What all of them have."""

    fixes_l0 = False
    """k latents fire, per token or on average: the config needs k, and there is no sparsity penalty."""
    penalties: tuple[str, ...] = ()
    """Sparsity penalties that it can be trained with."""

    def __init__(self, config: "SAEConfig", num_latents: int) -> None:
        """`num_latents` are those held here, fewer than the config's in a shard."""
        super().__init__()

    def encode(self, encoder: Encoder, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inference: values [N, K] and int64 indices [N, K], -1 for padding; a row does not depend on the others."""
        raise NotImplementedError

    def dense(self, z_NF: torch.Tensor, b_enc_F: torch.Tensor) -> torch.Tensor:
        """All latents [N, F], differentiable, for the activations that train densely."""
        raise NotImplementedError


def encode_above(
    encoder: Encoder, centred_ND: torch.Tensor, threshold: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All z above a threshold, a scalar or [F]: values [N, M] in descending order and indices, -1 for padding."""
    return encode_threshold(
        centred_ND,
        encoder.W_enc,
        encoder.b_enc,
        threshold,
        compute=encoder.compute,
    )


class TopK(Activation):
    """The k largest positive pre-activations of each token (Makhzani and Frey 2013; Gao et al. 2024)."""

    fixes_l0 = True

    def __init__(self, config: "SAEConfig", num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.k = config.k or 1

    def encode(self, encoder: Encoder, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values in descending order, exactly k slots."""
        return self.select(encoder, centred_ND, self.k)

    def select(self, encoder: Encoder, centred_ND: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [N, K] in descending order and int64 indices [N, K], -1 where nothing fires. No gradient."""
        return encode_topk(
            centred_ND,
            encoder.W_enc,
            encoder.b_enc,
            k,
            compute=encoder.compute,
        )


class BatchTopK(Activation):
    """k latents per token on average over the batch; at inference a threshold that training has learnt stands for k.

    ``threshold`` is the moving average, over steps, of the least value that the batch kept.
    """

    fixes_l0 = True
    threshold: torch.Tensor

    def __init__(self, config: "SAEConfig", num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.decay = config.threshold_decay
        self.register_buffer("threshold", torch.zeros(()))
        self.lower_bound: float | None = None
        """Where the next search for the batch's threshold may begin: saves time, does not change the result."""

    def encode(self, encoder: Encoder, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every z above the learnt threshold, in descending order."""
        return encode_above(encoder, centred_ND, self.threshold)

    @torch.no_grad()
    def learn(self, least: torch.Tensor) -> None:
        """Move the threshold towards the least value that a step's batch kept, a scalar tensor."""
        self.threshold.lerp_(least.to(self.threshold), 1 - self.decay)


class ReLU(Activation):
    """Every positive pre-activation."""

    penalties = ("l1", "tanh", "tanh_quad")

    def encode(self, encoder: Encoder, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In descending order."""
        return encode_above(encoder, centred_ND, 0.0)

    def dense(self, z_NF: torch.Tensor, b_enc_F: torch.Tensor) -> torch.Tensor:
        return torch.relu(z_NF)


class JumpReLU(Activation):
    """Pre-activations above a threshold of each latent's own, which straight-through gradients teach."""

    penalties = ("l0", "tanh", "tanh_quad")

    def __init__(self, config: "SAEConfig", num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.bandwidth = config.bandwidth
        self.log_threshold = nn.Parameter(torch.full((num_latents,), math.log(config.threshold_init)))

    def encode(self, encoder: Encoder, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In descending order."""
        return encode_above(encoder, centred_ND, self.log_threshold.exp())

    def dense(self, z_NF: torch.Tensor, b_enc_F: torch.Tensor) -> torch.Tensor:
        return jump_relu(z_NF, self.log_threshold, self.bandwidth)


class Gated(Activation):
    """One encoder decides which latents fire, a rescaled copy of it how strongly.

    The gate's pre-activation is z itself, so b_enc is the paper's b_gate and W_enc its W_gate.
    """

    penalties = ("l1",)

    def __init__(self, config: "SAEConfig", num_latents: int) -> None:
        super().__init__(config, num_latents)
        self.r_mag = nn.Parameter(torch.zeros(num_latents))
        self.b_mag = nn.Parameter(torch.zeros(num_latents))

    def encode(self, encoder: Encoder, centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In descending order of z; a latent whose gate is open and whose magnitude is not positive is padding."""
        z_NK, indices_NK = encode_above(encoder, centred_ND, 0.0)
        latents_NK = indices_NK.clamp_min(0)
        pull_NK = z_NK - encoder.b_enc[latents_NK]
        values_NK = torch.relu(torch.exp(self.r_mag)[latents_NK] * pull_NK + self.b_mag[latents_NK])
        values_NK = values_NK.masked_fill(indices_NK < 0, 0.0)
        return values_NK, indices_NK.masked_fill(values_NK == 0, -1)

    def dense(self, z_NF: torch.Tensor, b_enc_F: torch.Tensor) -> torch.Tensor:
        """The gate passes no gradient: it learns through the penalty and the auxiliary reconstruction."""
        magnitude_NF = torch.exp(self.r_mag) * (z_NF - b_enc_F) + self.b_mag
        return torch.relu(magnitude_NF) * (z_NF.detach() > 0)


ACTIVATIONS: dict[str, type[Activation]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "gated": Gated,
}
