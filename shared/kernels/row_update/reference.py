"""The truth of ``row_update``: its four steps as four formulas over the whole matrix."""

import torch


def row_update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    clip: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    unit_rows: bool,
) -> None:
    """See ``shared.kernels.row_update.row_update``."""
    grad = grad * clip
    if unit_rows:
        grad = grad - (grad * weight).sum(1, keepdim=True) * weight
    first.copy_(betas[0] * first + (1 - betas[0]) * grad)
    second.copy_(betas[1] * second + (1 - betas[1]) * grad.square())
    mean, square = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
    weight.sub_(lr * mean / (square.sqrt() + eps))
    if unit_rows:
        weight.div_(weight.norm(dim=1, keepdim=True))
