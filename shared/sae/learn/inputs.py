"""What goes into the losses of one micro-batch, and what comes out of them."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from shared.sae.latents import SparseLatents


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What the losses of some rows need to know of the whole batch that they are part of."""

    values: Tensor | None = None
    """batchtopk: candidates [N, M] of these rows, among which are all that the batch keeps."""
    indices: Tensor | None = None
    """Their latents; -1 for padding."""
    least: Tensor | None = None
    """The least value that the batch keeps, a scalar."""
    least_multi: Tensor | None = None
    """The same with multi_topk_factor times as many."""
    groups: tuple["BatchFacts", ...] = ()
    """Of a dictionary of several groups: those of each, and nothing else."""
    frequency: Tensor | None = None
    """tanh_quad: the batch's mean of tanh(c f) per latent, [F]."""

    def for_one_row(self) -> Self:
        """Make those of a row that stands in where a rank has none: it picks nothing."""
        if self.groups:
            return replace(self, groups=tuple(one.for_one_row() for one in self.groups))
        if self.values is None or self.indices is None:
            return self
        return replace(self, values=self.values.new_zeros(1, 1), indices=self.indices.new_full((1, 1), -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """What the losses of a micro-batch take beside its rows."""

    dead: Tensor | None = None
    """bool [F], or the int64 indices of the dead latents (a bool mask on CUDA costs a host synchronisation); None: no
    AuxK."""
    k: int | None = None
    """Latents per token of this step, for schedules; None: the config's."""
    penalty_scale: float = 1.0
    """What multiplies the sparsity penalties, for their warm-up."""
    facts: BatchFacts | None = None
    """This micro-batch's entry of ``Objective.facts``; None: these rows are the batch."""
    last: bool = True
    """Whether it is the step's last micro-batch."""

    def with_facts(self, facts: BatchFacts | None) -> Self:
        """The same with other facts."""
        return replace(self, facts=facts)


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of one batch: call ``total.backward()``. The parts are detached scalars on the same device."""

    total: Tensor
    reconstruction: Tensor
    fired: Tensor
    """bool [F]: which latents were nonzero on any row."""
    latents: SparseLatents | None = None
    """Detached; None for the activations that train densely."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """fvu (ratio of sums), l0; the parts by name (auxk, multi_topk, penalty, gate, preact) where they are on. Each is
    a mean over the batch's tokens."""


def dead_indices(dead: Tensor) -> Tensor:
    """int64 [R] from a mask or from indices."""
    return dead.nonzero().squeeze(1) if dead.dtype == torch.bool else dead
