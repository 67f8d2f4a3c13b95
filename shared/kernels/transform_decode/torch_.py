"""``transform_decode`` by plain products, one transform after another: each gathers the rows that fired it."""

from collections.abc import Iterator
from itertools import pairwise

import torch

from shared.kernels.pairs import PairOrder
from shared.kernels.transform_decode.ranks import Ranks


def _by_transform(order: PairOrder, ranks: Ranks) -> Iterator[tuple[slice, slice]]:
    """The sorted pairs of each transform that fired, and its rows."""
    for (first, last), (top, bottom) in zip(pairwise(order.starts()), ranks.spans(), strict=True):
        if last > first:
            yield slice(first, last), slice(top, bottom)


def forward(
    values_NK: torch.Tensor,
    order: PairOrder,
    x_ND: torch.Tensor,
    V_RD: torch.Tensor,
    U_RE: torch.Tensor,
    ranks: Ranks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is decoded [N, E], and V_i x of every pair, one after another, for ``backward``."""
    tokens_P, values_P = order.rows(), order.sort(values_NK)
    y_NE = x_ND.new_zeros(len(x_ND), U_RE.shape[1])
    kept = [x_ND.new_empty(0)]
    for pairs, rows in _by_transform(order, ranks):
        tokens_p = tokens_P[pairs]
        h_pr = x_ND.index_select(0, tokens_p) @ V_RD[rows].T
        kept.append(h_pr.flatten())
        # A transform is picked once by a token, so that no two of these rows are the same.
        y_NE.index_add_(0, tokens_p, (h_pr * values_P[pairs, None]) @ U_RE[rows])
    return y_NE, torch.cat(kept)


def backward(
    grad_NE: torch.Tensor,
    values_NK: torch.Tensor,
    order: PairOrder,
    x_ND: torch.Tensor,
    V_RD: torch.Tensor,
    U_RE: torch.Tensor,
    ranks: Ranks,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the values, of V and of U."""
    tokens_P, values_P = order.rows(), order.sort(values_NK)
    dvalues_P, dV_RD, dU_RE = torch.zeros_like(values_P), torch.zeros_like(V_RD), torch.zeros_like(U_RE)
    start = 0
    for pairs, rows in _by_transform(order, ranks):
        tokens_p, values_p1 = tokens_P[pairs], values_P[pairs, None]
        shape = (pairs.stop - pairs.start, rows.stop - rows.start)
        h_pr = kept.narrow(0, start, shape[0] * shape[1]).view(shape)
        start += h_pr.numel()
        grad_pE = grad_NE.index_select(0, tokens_p)
        t_pr = grad_pE @ U_RE[rows].T
        dvalues_P[pairs] = (t_pr * h_pr).sum(1)
        torch.mm((h_pr * values_p1).T, grad_pE, out=dU_RE[rows])
        torch.mm((t_pr * values_p1).T, x_ND.index_select(0, tokens_p), out=dV_RD[rows])
    return order.unsort(dvalues_P), dV_RD, dU_RE
