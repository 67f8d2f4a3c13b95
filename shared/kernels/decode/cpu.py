"""``decode`` and its gradient for the values, touching K of the F rows per token."""

import torch
import torch.nn.functional as F


def decode(values_NK: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.decode``."""
    padded = indices_NK < 0
    values_NK = values_NK.masked_fill(padded, 0)
    return F.embedding_bag(indices_NK.masked_fill(padded, 0), W_FD, per_sample_weights=values_NK, mode="sum")


def dot_picks(grad_ND: torch.Tensor, indices_NK: torch.Tensor, W_FD: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.decode.dot_picks``."""
    num_rows, num_picks = indices_NK.shape
    padded = indices_NK < 0
    flat = indices_NK.masked_fill(padded, 0).reshape(-1)
    offsets = torch.arange(0, flat.numel(), num_picks, device=flat.device)
    bag_of_pick = torch.arange(num_rows, device=flat.device).repeat_interleave(num_picks)
    # embedding_bag's own backward for its weights is exactly this product, threaded and without an [N, K, D] tensor.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_ND.contiguous(), W_FD, flat, offsets, bag_of_pick, 0, -1
    )
    return dots.view(num_rows, num_picks).masked_fill_(padded, 0)
