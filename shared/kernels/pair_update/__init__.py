"""A weight's gradient kept as the pairs it is a sum over, and the optimiser's pass that consumes it.

The gradient of [F, D] weights from N * K pairs is as large as the weights. It need not exist: the norm for clipping and
the update each sum a row's pairs, once per step each, in a GPU's registers or in a CPU's cache. The reference makes it
by ``row_grad`` and consumes it by ``row_update``.

Shapes: N rows, D d_model, F latents, K picks per row, R rows with a further, dense gradient.
"""

from types import ModuleType
from typing import Any

import torch

from shared.kernels.adam_step import AdamStep
from shared.kernels.dispatch import implementation, resolve
from shared.kernels.pairs import PairOrder
from shared.kernels.row_grad import row_grad
from shared.kernels.row_update import row_update

Term = tuple[torch.Tensor, torch.Tensor, PairOrder, torch.Tensor]


class PairGradient:
    """Gradient of one [F, D] weight: a sum of ``row_grad`` terms, and rows (AuxK's) that are added on top.

    Filled by the backward of ``attach_encoder``, ``sparse_decode`` and ``take_rows`` in place of ``.grad``; read by
    ``squared_norm`` and ``update``; emptied by ``clear``.
    """

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self.extra: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._dense_FD: torch.Tensor | None = None
        self._walk: Any = None

    def add(
        self, coefficients_NK: torch.Tensor, indices_NK: torch.Tensor, order: PairOrder, rows_ND: torch.Tensor
    ) -> None:
        """Add ``row_grad`` of these."""
        self._walk = None
        self.terms.append((coefficients_NK, indices_NK, order, rows_ND))

    def add_rows(self, latents_R: torch.Tensor, rows_RD: torch.Tensor) -> None:
        """Add `rows_RD` to the gradient's rows `latents_R`, which must be distinct."""
        self._walk = None
        self.extra.append((latents_R, rows_RD))

    def __bool__(self) -> bool:
        return bool(self.terms or self.extra)

    def clear(self) -> None:
        """Back to a gradient of 0."""
        self.terms, self.extra, self._dense_FD, self._walk = [], [], None, None

    def dense(self, weight: torch.Tensor, kernels: str) -> torch.Tensor:
        """The gradient itself, like `weight`; made once. Changing it changes what ``update`` sees."""
        if self._dense_FD is None:
            total = None
            for coefficients, indices, order, rows in self.terms:
                term = row_grad(coefficients, indices, rows, weight.shape[0], order, kernels=kernels)
                total = term if total is None else total.add_(term)
            self._dense_FD = torch.zeros_like(weight) if total is None else total.to(weight.dtype)
            for latents, rows in self.extra:
                self._dense_FD.index_add_(0, latents, rows)
        return self._dense_FD

    def squared_norm(self, weight: torch.Tensor, *, kernels: str = "auto") -> torch.Tensor:
        """Sum of the squares of the gradient of `weight` [F, D], a float32 or float64 scalar tensor."""
        if self._fuses(weight, kernels):
            module = implementation("pair_update", kernels, weight)
            norm: torch.Tensor = module.squared_norm(weight, self._get_walk(module))
            return norm
        return torch.linalg.vector_norm(self.dense(weight, kernels)).square()

    def update(
        self,
        weight: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        adam: AdamStep,
        *,
        kernels: str = "auto",
    ) -> None:
        """``row_update`` with this gradient, which is used up: the object is cleared."""
        if self._fuses(weight, kernels):
            module = implementation("pair_update", kernels, weight)
            module.pair_update(weight, first, second, adam, self._get_walk(module))
        else:
            row_update(weight, self.dense(weight, kernels), first, second, adam, kernels=kernels)
        self.clear()

    def _fuses(self, weight: torch.Tensor, kernels: str) -> bool:
        # Several terms (Multi-TopK, micro-batches) would need several walks per row: those make the gradient.
        return (
            resolve(kernels, weight) != "reference"
            and len(self.terms) == 1
            and len(self.extra) <= 1
            and self._dense_FD is None
        )

    def _get_walk(self, module: ModuleType) -> Any:
        """What the implementation reads, made once for the norm and the update."""
        if self._walk is None:
            (coefficients_NK, _, order, rows_ND), (latents_R, extra_RD) = self.terms[0], (*self.extra, (None, None))[0]
            self._walk = module.make_walk(coefficients_NK, order, rows_ND, latents_R, extra_RD)
        return self._walk


class PairGradients(dict[str, PairGradient]):
    """One ``PairGradient`` per weight, by the parameter's name."""

    def clear(self) -> None:
        """Empty every gradient; the names stay."""
        for gradient in self.values():
            gradient.clear()
