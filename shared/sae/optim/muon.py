"""Muon: the momentum of each matrix, orthogonalised.

Shapes: F rows (latents) held here, D columns.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shared.kernels import Compute, product
from shared.sae.optim.adam import MomentsConfig, WithMoments
from shared.sae.optim.base import project, renormalise

# The iteration bears rounded products (Jordan et al. 2024); in float32 a GPU takes seconds for them.
HALF_ON_A_GPU = Compute(dtype="auto")


@dataclass(frozen=True, kw_only=True)
class MuonConfig(MomentsConfig):
    """Options of ``Muon``; those of Adam are for the vectors."""

    kind: ClassVar[str] = "muon"

    momentum: float = 0.95
    """Decay of the matrices' momentum, per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_decay("momentum")


class Muon(WithMoments):
    """Muon (Jordan et al. 2024), with Nesterov's momentum, on the matrices; Adam on the vectors.

    The momentum's singular values are brought near 1 by Newton-Schulz steps on its D x D Gram matrix, a sum over rows:
    shards of rows add theirs up. lr is scaled by ``0.2 sqrt(max(F, D))``, with F the rows of all shards, which gives
    the updates Adam's size (Liu et al. 2025), so that Adam's rates fit.
    """

    # Quintic coefficients that rise fast and end near 1, and how often they are applied.
    coefficients = (3.4445, -4.7750, 2.0315)
    num_iterations = 5
    by_element = False

    config_type = MuonConfig
    config: MuonConfig

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        return torch.zeros_like(parameter) if kind == "first" or not self.roles[name].is_matrix else None

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first = self.moment("first", name)
        if not self.roles[name].is_matrix:
            self.adam(weight, grad, first, self.moment("second", name), clip=clip, lr=lr, unit_rows=unit_rows)
            return
        grad = project(grad * clip, weight, unit_rows)
        first.lerp_(grad, 1 - self.config.momentum)
        direction = self.orthogonalise(grad.lerp(first, self.config.momentum))
        num_rows = len(weight) * self.rows.parts
        weight.sub_(direction, alpha=lr * 0.2 * max(num_rows, weight.shape[1]) ** 0.5)
        renormalise(weight, unit_rows)

    def orthogonalise(self, matrix_FD: Tensor) -> Tensor:
        """The matrix with its singular values near 1; F counts the rows of all shards."""
        a, b, c = self.coefficients
        square = matrix_FD.square().sum()
        self.rows.sum_up(square)
        matrix_FD = matrix_FD / (square.sqrt() + 1e-7)
        for _ in range(self.num_iterations):
            gram_DD = product(matrix_FD.T, matrix_FD, compute=HALF_ON_A_GPU)
            self.rows.sum_up(gram_DD)
            moved_FD = product(matrix_FD, b * gram_DD + c * gram_DD @ gram_DD, compute=HALF_ON_A_GPU)
            matrix_FD = a * matrix_FD + moved_FD
        return matrix_FD
