"""The optimiser's pass over a matrix: clip, project, Adam, renormalise, each row read and written once."""

import torch

from shared.kernels.adam_step import AdamStep
from shared.kernels.dispatch import implementation


def row_update(
    weight: torch.Tensor,
    grad: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    adam: AdamStep,
    *,
    kernels: str = "auto",
) -> None:
    """Update `weight` [F, D] and its Adam moments `first` and `second` in place; `grad` is scratch afterwards.

    What happens says ``AdamStep``. All four tensors are contiguous and of one type. Rows without gradient are updated
    too: their moments decay as Adam's do.
    """
    implementation("row_update", kernels, weight).row_update(weight, grad, first, second, adam)
