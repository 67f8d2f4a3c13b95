"""The truth of ``row_update``: its four steps as four formulas over the whole matrix."""

import torch

from shared.kernels.adam_step import AdamStep


def row_update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    adam: AdamStep,
) -> None:
    """See ``shared.kernels.row_update.row_update``."""
    beta1, beta2 = adam.betas
    grad = grad * adam.clip
    if adam.unit_rows:
        grad = grad - (grad * weight).sum(1, keepdim=True) * weight
    first.copy_(beta1 * first + (1 - beta1) * grad)
    second.copy_(beta2 * second + (1 - beta2) * grad.square())
    mean, square = first / adam.corrections[0], second / adam.corrections[1]
    weight.sub_(adam.lr * mean / (square.sqrt() + adam.eps))
    if adam.unit_rows:
        weight.div_(weight.norm(dim=1, keepdim=True))
