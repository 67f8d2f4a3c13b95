"""The optimiser's pass over a matrix: clip, project, Adam, renormalise, each row read and written once."""

import torch

from shared.kernels.dispatch import implementation


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
    kernels: str = "auto",
) -> None:
    """Update `weight` [F, D] and its Adam moments `first` and `second` in place; `grad` is scratch afterwards.

    ``g = clip * grad``, then with `unit_rows` its component along each row is removed; Adam (Kingma and Ba 2015) with
    bias correction at step number `step`, counted from 1; with `unit_rows` each row is divided by its norm. All four
    tensors are contiguous and of one type; `clip` is a scalar tensor on their device, so a clip costs no host
    synchronisation. Rows without gradient are updated too: their moments decay as Adam's do.
    """
    implementation("row_update", kernels, weight).row_update(
        weight, grad, first, second, clip=clip, lr=lr, betas=betas, eps=eps, step=step, unit_rows=unit_rows
    )
