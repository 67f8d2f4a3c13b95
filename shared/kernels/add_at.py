"""Sums by index that are the same bits at every run."""

from torch import Tensor


def add_at(into: Tensor, index_N: Tensor, rows: Tensor) -> None:
    """Add each of `rows` [N, ...] to the row of `into` that int64 `index_N` names, which may be named many times.

    In place. A GPU's ``index_add_`` adds in the order in which its threads arrive; there the rows are sorted first.
    """
    if into.is_cuda:
        into.index_put_((index_N,), rows.to(into.dtype), accumulate=True)
    else:
        into.index_add_(0, index_N, rows)
