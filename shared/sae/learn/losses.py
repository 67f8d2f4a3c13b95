"""Reconstruction, AuxK and sparsity losses.

All are means over tokens of a per-token quantity that does not look at the rest of the batch: a loss does not change
when a batch is cut into micro-batches or spread over ranks. tanh_quad is not by nature; see ``penalty_per_latent``.
Shapes: N tokens, D d_model, F latents, R dead latents.
"""

from collections.abc import Sequence

import torch

from shared.kernels import Compute, DeadRows, auxk_error
from shared.kernels.compute import AUTO
from shared.sae.latent_shard import WHOLE, LatentShard
from shared.sae.learn.config import LearningConfig


def reconstruction_weight(variance_D: torch.Tensor, loss: str, widths: Sequence[int] = ()) -> torch.Tensor:
    """w_D such that ``mean_n sum_d w_d (x_hat - x)_nd^2`` is the loss `loss`.

    fvu: ratio of summed squared error to summed variance, 1 / sum_d var_d for each dimension. fvu_per_dim: mean over
    dimensions of the per-dimension ratio, 1 / (D var_d) (OpenSAE). The variance is that of the data set. Of several
    sites, with these `widths` side by side, it is the mean over sites: each counts alike.
    """
    if len(widths) > 1:
        sites = [reconstruction_weight(part, loss) for part in torch.split(variance_D, list(widths))]
        return torch.cat(sites) / len(sites)
    if loss == "fvu":
        return (1 / variance_D.sum()).expand_as(variance_D)
    # A dimension that hardly varies must not own the loss.
    floor = 1e-4 * variance_D.mean()
    return 1 / (variance_D.numel() * torch.maximum(variance_D, floor))


def weighted_square_error(error_ND: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    """``mean_n sum_d weight_d error_nd^2``, a scalar."""
    return (error_ND.square() @ weight_D).mean()


def auxk_loss(
    residual_ND: torch.Tensor,
    centred_ND: torch.Tensor,
    dead: DeadRows,
    num_aux: int,
    *,
    slope: float = 0.0,
    shard: LatentShard = WHOLE,
    compute: Compute = AUTO,
) -> torch.Tensor:
    """Dead latents reconstruct what the living ones leave over (Gao et al. 2024, section A.2); a scalar.

    ``scale * mean_n |e_n - e_hat_n|^2 / |e_n|^2`` with e = x - x_hat (pass it detached) and e_hat the decoding, without
    b_dec, of the num_aux largest of the dead latents; scale = min(dead.count / num_aux, 1). Gradients reach the dead
    latents' rows and encoder biases alone: pass `centred_ND`, the encoder's input, detached. ``dead.count`` is
    of all parts, R those given here. See ``shared.kernels.auxk_error`` for `slope` and `compute`.
    """
    error = auxk_error(residual_ND, centred_ND, dead, num_aux, slope=slope, compute=compute, ranks=shard)
    return min(dead.count / num_aux, 1.0) * error


def saturated(f_NF: torch.Tensor, config: LearningConfig, norm_F: torch.Tensor | None) -> torch.Tensor:
    """``tanh(c f n)`` [N, F] (Anthropic, January 2025); n are the decoder's norms, None where they are 1."""
    return torch.tanh(config.tanh_scale * (f_NF if norm_F is None else f_NF * norm_F))


def penalty_per_latent(
    f_NF: torch.Tensor, config: LearningConfig, norm_F: torch.Tensor | None, frequency_F: torch.Tensor | None
) -> torch.Tensor:
    """The penalty l1, tanh or tanh_quad of each latent, mean over tokens: [F].

    l1: ``f n``. tanh: ``tanh(c f n)``. tanh_quad: ``p (1 + p / s)`` with p the mean of tanh(c f n) over the whole batch
    (Language-Model-SAEs); `frequency_F` is that p, None where these rows are the batch. Its gradient in p, 1 + 2 p / s,
    is the same for all tokens: so these rows' part has the right gradient, and the value is that of the batch.
    """
    if config.penalty == "l1":
        return (f_NF if norm_F is None else f_NF * norm_F).mean(0)
    own_F = saturated(f_NF, config, norm_F).mean(0)
    if config.penalty == "tanh":
        return own_F
    p_F = own_F.detach() if frequency_F is None else frequency_F
    scale = config.frequency_scale
    return p_F * (1 + p_F / scale) + (1 + 2 * p_F / scale) * (own_F - own_F.detach())


def preact_loss(z_NR: torch.Tensor, log_threshold_R: torch.Tensor, norm_R: torch.Tensor | None) -> torch.Tensor:
    """``mean_n sum_i relu(theta_i - z_ni) n_i`` over dead latents: pulls them up to where they fire (SAELens's form of
    Anthropic's January 2025 penalty, which takes all latents)."""
    below_NR = torch.relu(log_threshold_R.exp() - z_NR)
    return (below_NR if norm_R is None else below_NR * norm_R).sum(1).mean()
