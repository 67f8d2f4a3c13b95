"""The dense truth of ``transform_decode``: every transform of every row. Autograd gives its gradients."""

import torch

from shared.kernels.decode.reference import scatter_dense
from shared.kernels.transform_decode.ranks import Ranks


def transform_decode(
    values_NK: torch.Tensor,
    indices_NK: torch.Tensor,
    x_ND: torch.Tensor,
    V_RD: torch.Tensor,
    U_RE: torch.Tensor,
    ranks: Ranks,
) -> torch.Tensor:
    """See ``shared.kernels.transform_decode.transform_decode``."""
    dense_NF = scatter_dense(values_NK, indices_NK, len(ranks.each))
    return (ranks.spread(dense_NF) * (x_ND @ V_RD.T)) @ U_RE
