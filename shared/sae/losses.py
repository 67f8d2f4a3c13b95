"""Reconstruction and AuxK losses.

Both are means over tokens of a per-token quantity that does not look at the rest of the batch: a loss does not change
when a batch is cut into micro-batches or spread over ranks. Shapes: N tokens, D d_model, R dead latents.
"""

import torch

from shared.kernels import auxk_error


def reconstruction_weight(variance_D: torch.Tensor, loss: str) -> torch.Tensor:
    """w_D such that ``mean_n sum_d w_d (x_hat - x)_nd^2`` is the loss `loss`.

    fvu: ratio of summed squared error to summed variance, 1 / sum_d var_d for each dimension. fvu_per_dim: mean over
    dimensions of the per-dimension ratio, 1 / (D var_d) (OpenSAE). The variance is that of the data set.
    """
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
    W_enc_RD: torch.Tensor,
    b_enc_R: torch.Tensor,
    W_dec_RD: torch.Tensor,
    num_aux: int,
    *,
    kernels: str = "auto",
    compute_dtype: str = "float32",
) -> torch.Tensor:
    """Dead latents reconstruct what the living ones leave over (Gao et al. 2024, section A.2); a scalar.

    ``scale * mean_n |e_n - e_hat_n|^2 / |e_n|^2`` with e = x - x_hat and e_hat the decoding, without b_dec, of the
    num_aux largest of the R dead latents; scale = min(R / num_aux, 1). Gradients reach the dead latents' rows and
    encoder biases alone. See ``shared.kernels.auxk_error`` for `kernels` and `compute_dtype`.
    """
    error = auxk_error(
        residual_ND,
        centred_ND,
        W_enc_RD,
        b_enc_R,
        W_dec_RD,
        num_aux,
        kernels=kernels,
        compute_dtype=compute_dtype,
    )
    return error * min(W_enc_RD.shape[0] / num_aux, 1.0)
