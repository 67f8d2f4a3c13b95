"""Latents that attend, all at once and by autograd: the truth that tests compare the tiles with."""

from torch import Tensor

from shared.kernels.attention.pattern import patterns
from shared.kernels.attention.tiles import Attended, mixed


def preactivations(read: Attended, W_FD: Tensor, b_F: Tensor) -> Tensor:
    """z [N, F], differentiable in every weight; holds every pattern."""
    A_CHTT = patterns(read.x_CTD, read.documents_CT, read.heads, read.form, read.compute)
    return (mixed(A_CHTT, read.x_CTD, W_FD, read.compute) + b_F).index_select(0, read.places_N)
