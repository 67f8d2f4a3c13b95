"""The dense truth of ``decode``: scatter to [N, F], then one matrix product. Autograd gives its gradients."""

import torch


def scatter_dense(values_NK: torch.Tensor, indices_NK: torch.Tensor, num_latents: int) -> torch.Tensor:
    """Picks to the dense [N, F] matrix; duplicates add up, -1 is ignored. Differentiable in the values."""
    kept = values_NK.masked_fill(indices_NK < 0, 0)
    dense_NF = values_NK.new_zeros(values_NK.shape[0], num_latents)
    return dense_NF.scatter_add(1, indices_NK.clamp_min(0), kept)


def decode(values_NK: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.decode``."""
    return scatter_dense(values_NK, indices_NK, W_FD.shape[0]) @ W_FD


def dot_picks(grad_ND: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.dot_picks``."""
    dots_NF = grad_ND @ W_FD.T
    return dots_NF.gather(1, indices_NK.clamp_min(0)).masked_fill(indices_NK < 0, 0)
