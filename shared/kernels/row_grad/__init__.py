"""Weight gradients of both matrices: each latent's row is a weighted sum over the tokens that picked it."""

import torch

from shared.kernels.dispatch import implementation, resolve
from shared.kernels.pairs import PairOrder
from shared.kernels.row_grad import reference


def row_grad(
    coefficients_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    rows_ND: torch.Tensor,
    num_latents: int,
    order: PairOrder,
    *,
    kernels: str = "auto",
) -> torch.Tensor:
    """``out[f] = sum over picks (n, j) of latent f: coefficients[n, j] * rows[n]``, [F, D].

    With the values and the output gradient this is the gradient of W_dec; with the gradient of the pre-activations and
    the encoder's input, of W_enc. -1 picks are ignored. The sum runs in row order: the same bits on every run.
    `order` holds the sorted pairs of the same indices, shared between the two.
    """
    if resolve(kernels, rows_ND) == "reference":
        return reference.row_grad(coefficients_NK, indices_NK, rows_ND, num_latents)
    return implementation("row_grad", kernels, rows_ND).row_grad(coefficients_NK, order, rows_ND)


def latent_sum(
    coefficients_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    num_latents: int,
    order: PairOrder,
    *,
    kernels: str = "auto",
) -> torch.Tensor:
    """``out[f] = sum over picks (n, j) of latent f: coefficients[n, j]``, [F]: the gradient of b_enc."""
    if resolve(kernels, coefficients_NK) == "reference":
        return reference.latent_sum(coefficients_NK, indices_NK, num_latents)
    return implementation("row_grad", kernels, coefficients_NK).latent_sum(coefficients_NK, order)
