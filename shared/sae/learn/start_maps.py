"""Where the transforms of a MoLT start.

Shapes: M tokens of a sample, m of them on which a transform is on, D and E widths read and written, r its rank.
"""

import torch
from torch import Tensor

from shared.kernels import PairOrder
from shared.sae.learn.objective import Objective
from shared.sae.variants.molt import MoLT

# Penalty of the regression, in units of the mean square of what it is on.
RIDGE = 0.1


@torch.no_grad()
def start_maps(objective: Objective, molt: MoLT, x_MD: Tensor, y_MD: Tensor) -> None:
    """Every U_i as the ridge regression of what is wanted on ``f_i V_i x``, where transform i is on; V_i stays random.

    Then every transform has norm 1. Those that no token of the sample turns on keep their random factors.
    """
    centred_MD, target_MD, _, _ = objective.terms.prepare(x_MD, y_MD)
    assert isinstance(centred_MD, Tensor)
    objective.rule.fit_to_sample(centred_MD)
    wanted_ME = objective.terms.wanted(target_MD, centred_MD) - molt.b_dec
    ((values_MK, indices_MK),) = objective.terms.fire(centred_MD)
    order = PairOrder(indices_MK, molt.num_latents)
    starts, tokens_P, values_P = order.starts(), order.rows(), order.sort(values_MK)
    for latent, (top, bottom) in enumerate(molt.ranks.spans()):
        pairs = slice(starts[latent], starts[latent + 1])
        tokens_m = tokens_P[pairs]
        if len(tokens_m):
            h_mr = centred_MD[tokens_m] @ molt.V[top:bottom].T * values_P[pairs, None]
            molt.U[top:bottom] = regression(h_mr, wanted_ME[tokens_m])
    molt.to_unit_norm()


def regression(h_mr: Tensor, wanted_mE: Tensor) -> Tensor:
    """The [r, E] that minimises ``sum |wanted - h U|^2 + ridge |U|^2``, by way of the smaller of [r, r] and [m, m]."""
    ridge = RIDGE * h_mr.square().sum() / h_mr.shape[1] + torch.finfo(h_mr.dtype).tiny
    size = min(h_mr.shape)
    eye = torch.eye(size, dtype=h_mr.dtype, device=h_mr.device)
    if h_mr.shape[1] == size:
        return torch.linalg.solve(h_mr.T @ h_mr + ridge * eye, h_mr.T @ wanted_mE)
    return h_mr.T @ torch.linalg.solve(h_mr @ h_mr.T + ridge * eye, wanted_mE)
