"""``row_grad`` as a transposed embedding bag: one bag per latent over its pairs, in a fixed order, no atomics."""

import torch
import torch.nn.functional as F

from shared.kernels.pairs import PairOrder, SortedPairs


def row_grad(coefficients_NK: torch.Tensor, order: PairOrder, rows_ND: torch.Tensor) -> torch.Tensor:
    """See ``shared.kernels.row_grad.row_grad``."""
    order_P, offsets_F = _without_padding(order.get())
    return F.embedding_bag(
        order_P // coefficients_NK.shape[1],
        rows_ND,
        offsets_F,
        per_sample_weights=coefficients_NK.reshape(-1)[order_P],
        mode="sum",
        include_last_offset=True,
    )


def latent_sum(coefficients_NK: torch.Tensor, order: PairOrder) -> torch.Tensor:
    """See ``shared.kernels.row_grad.latent_sum``."""
    order_P, offsets_F = _without_padding(order.get())
    return torch.segment_reduce(coefficients_NK.reshape(-1)[order_P], "sum", offsets=offsets_F, initial=0.0)


def _without_padding(pairs: SortedPairs) -> tuple[torch.Tensor, torch.Tensor]:
    num_padding = int(pairs.offsets_F[0])  # a bag must begin at the first pair
    return pairs.order_P[num_padding:], pairs.offsets_F - num_padding
