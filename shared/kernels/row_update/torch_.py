"""``row_update`` by torch's fused Adam, in tiles of rows so that the projections around it find their rows in cache."""

import torch

from shared.kernels.adam_step import AdamStep

# Elements of a tile of rows: weight, gradient and both moments of one tile fit in a last-level cache.
TILE_ELEMENTS = 1 << 19


def tile_rows(weight: torch.Tensor) -> int:
    """Rows of a tile."""
    return max(1, TILE_ELEMENTS // weight.shape[1])


def row_update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    adam: AdamStep,
) -> None:
    """See ``shared.kernels.row_update.row_update``."""
    divisor = adam.clip.reciprocal().float()  # the type the fused kernel reads
    size = tile_rows(weight) if adam.unit_rows else max(1, weight.shape[0])
    for start in range(0, weight.shape[0], size):
        tile = slice(start, start + size)
        rows = weight[tile]
        if adam.unit_rows:
            along = (grad[tile] * rows).sum(1, keepdim=True)
            grad[tile].addcmul_(along, rows, value=-1)
        _adam(rows, grad[tile], first[tile], second[tile], divisor, adam)
        if adam.unit_rows:
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def _adam(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    divisor: torch.Tensor,
    adam: AdamStep,
) -> None:
    torch._fused_adam_(
        [weight],
        [grad],
        [first],
        [second],
        [],
        [torch.tensor(float(adam.step), device=weight.device)],
        lr=adam.lr,
        beta1=adam.betas[0],
        beta2=adam.betas[1],
        weight_decay=0.0,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
    )
