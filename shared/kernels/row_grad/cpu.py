"""``row_grad`` as a transposed embedding bag: one bag per latent over its pairs, in a fixed order, no atomics."""

import torch
import torch.nn.functional as F

from shared.kernels.pairs import SortedPairs


def row_grad(coefficients_NK: torch.Tensor, pairs: SortedPairs, rows_ND: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.row_grad.row_grad``."""
    sorted_P = coefficients_NK.reshape(-1)[pairs.order_P]
    return F.embedding_bag(
        pairs.rows_P, rows_ND, pairs.offsets_F, per_sample_weights=sorted_P, mode="sum", include_last_offset=True
    )


def latent_sum(coefficients_NK: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
    """See ``shared.kernels.row_grad.latent_sum``."""
    sorted_P = coefficients_NK.reshape(-1)[pairs.order_P]
    return torch.segment_reduce(sorted_P, "sum", offsets=pairs.offsets_F, initial=0.0)
