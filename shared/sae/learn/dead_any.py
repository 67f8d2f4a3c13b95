"""AuxK where latents are more than two rows: the dead reconstruct what the living leave over (Gao et al. 2024, A.2).

Shapes: N rows, D_in and D_out widths of what is read and written, F latents held here, R dead ones of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels import leaky
from shared.sae.contexts import Given
from shared.sae.groups import LatentGroup
from shared.sae.latent_shard import LatentShard


@dataclass(frozen=True, slots=True)
class Dead:
    """Dead latents."""

    latents_R: Tensor
    """Those held here, int64."""
    count: int
    """Those of all parts together."""
    num_aux: int
    """How many of them reconstruct, per token."""
    slope: float
    """Of their ReLU below 0."""


def auxk_of_any(group: LatentGroup, residual_ND: Tensor, centred: Given, dead: Dead, shard: LatentShard) -> Tensor:
    """What ``losses.auxk_loss`` is for rows: ``scale * mean_n |e_n - e_hat_n|^2 / |e_n|^2``, with gradients for what
    the dead latents alone have. Pass the residual e and the encoder's input detached."""
    z_NR = leaky(group.preactivations_of(dead.latents_R, centred), dead.slope)
    if dead.count > dead.num_aux:
        z_NR = z_NR * (z_NR.detach() >= shard.kth_largest(z_NR.detach(), dead.num_aux))
    written_ND = shard.sum_forward(group.write_some(z_NR, dead.latents_R, centred))
    error_N = (residual_ND - written_ND).square().sum(1)
    energy_N = residual_ND.square().sum(1).clamp_min(torch.finfo(residual_ND.dtype).tiny)
    return min(dead.count / dead.num_aux, 1.0) * (error_N / energy_N).mean()
