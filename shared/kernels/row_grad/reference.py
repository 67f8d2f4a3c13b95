"""The dense truth of ``row_grad``: scatter to [N, F], then one transposed matrix product."""

import torch

from shared.kernels.decode.reference import scatter_dense


def row_grad(
    coefficients_NK: torch.Tensor, indices_NK: torch.Tensor, rows_ND: torch.Tensor, num_latents: int
) -> torch.Tensor:
    """See ``shared.kernels.row_grad.row_grad``."""
    return scatter_dense(coefficients_NK, indices_NK, num_latents).T @ rows_ND


def latent_sum(coefficients_NK: torch.Tensor, indices_NK: torch.Tensor, num_latents: int) -> torch.Tensor:
    """See ``shared.kernels.row_grad.latent_sum``."""
    return scatter_dense(coefficients_NK, indices_NK, num_latents).sum(0)
