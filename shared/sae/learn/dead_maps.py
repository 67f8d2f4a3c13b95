"""AuxK where latents are maps: the dead ones reconstruct what the living leave over (Gao et al. 2024, A.2).

Shapes: N rows, D_in and D_out widths of what is read and written, F latents held here, R dead ones of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.kernels import product
from shared.sae.latent_shard import LatentShard
from shared.sae.variants.molt import MoLT


@dataclass(frozen=True, slots=True)
class DeadMaps:
    """Dead latents."""

    latents_R: Tensor
    """Those held here, int64."""
    count: int
    """Those of all parts together."""
    num_aux: int
    """How many of them reconstruct, per token."""


def auxk_of_maps(molt: MoLT, residual_ND: Tensor, centred_ND: Tensor, dead: DeadMaps, shard: LatentShard) -> Tensor:
    """What ``losses.auxk_loss`` is for rows: ``scale * mean_n |e_n - e_hat_n|^2 / |e_n|^2``, with gradients for the
    dead latents' encoder and maps alone. Pass the residual e and the encoder's input detached."""
    z_NR = torch.relu(
        product(centred_ND, molt.W_enc[dead.latents_R].T, molt.b_enc[dead.latents_R], compute=molt.compute)
    )
    if dead.count > dead.num_aux:
        z_NR = z_NR * (z_NR.detach() >= shard.kth_largest(z_NR.detach(), dead.num_aux))
    written_ND = shard.sum_forward(molt.write_some(z_NR, dead.latents_R, centred_ND))
    error_N = (residual_ND - written_ND).square().sum(1)
    energy_N = residual_ND.square().sum(1).clamp_min(torch.finfo(residual_ND.dtype).tiny)
    return min(dead.count / dead.num_aux, 1.0) * (error_N / energy_N).mean()
