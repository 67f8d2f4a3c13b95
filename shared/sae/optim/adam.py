"""Adam, in one pass over the rows of each parameter.

Shapes: F rows (latents) held here, D columns.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.kernels import AdamStep, PairGradient, resolve, row_update
from shared.sae.optim.base import Optimiser, OptimiserConfig

# Elements of a tile whose bfloat16 moments are in float32 at a time.
TILE_ELEMENTS = 1 << 20
# Elements of the rows with a gradient that are gathered at a time: weight, gradient and both moments of them.
GATHERED_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class MomentsConfig(OptimiserConfig):
    """What Adam is told, also where it updates the vectors beside another optimiser's matrices."""

    beta1: float = 0.9
    """Decay of the first moment, per step."""
    beta2: float = 0.999
    """Decay of the second moment, per step."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_decay("beta1", "beta2")


@dataclass(frozen=True, kw_only=True)
class AdamConfig(MomentsConfig):
    """Options of ``Adam``."""

    kind: ClassVar[str] = "adam"

    moments: str = "float32"
    """Type of the moments: float32 (the parameters' own type) or bfloat16."""
    lazy: bool = False
    """Rows whose gradient is 0 in a step keep weights and moments in it, as in torch's SparseAdam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments not in ("float32", "bfloat16"):
            raise GranaryError(f"optim.moments={self.moments!r}: choose from float32, bfloat16")


class WithMoments(Optimiser):
    """An optimiser that updates some parameters, or all, by Adam (Kingma and Ba 2015)."""

    config: MomentsConfig

    def adam(
        self, weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, clip: Tensor, lr: float, unit_rows: bool
    ) -> None:
        """One step of Adam on `weight` [F, D] and its moments, in place; `grad` is scratch afterwards."""
        row_update(weight, grad, first, second, self.adam_step(clip, lr, unit_rows), kernels=self.kernels)

    def adam_step(self, clip: Tensor, lr: float, unit_rows: bool) -> AdamStep:
        """The present step, as the passes over a matrix take it."""
        betas = (self.config.beta1, self.config.beta2)
        return AdamStep(lr, betas, self.config.eps, self.step_number, clip, unit_rows)


class Adam(WithMoments):
    """Adam on all parameters.

    Moments may be kept in bfloat16, which halves their memory: they are rounded to it stochastically, since a second
    moment that changes by a thousandth per step would never leave its nearest bfloat16.

    With ``lazy`` a row of a matrix, or an element of a vector, whose gradient is 0 (its latent neither fired nor took
    part in AuxK) stays as it is with its moments: no momentum carries a rare latent on between the tokens it fires on.
    """

    config_type = AdamConfig
    config: AdamConfig

    @property
    def half(self) -> bool:
        """Whether the moments are kept in bfloat16."""
        return self.config.moments == "bfloat16"

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        return torch.zeros_like(parameter, dtype=torch.bfloat16 if self.half else parameter.dtype)

    def update_from_pairs(
        self, name: str, weight: Tensor, pairs: PairGradient, *, clip: Tensor, lr: float, unit_rows: bool
    ) -> None:
        if self.config.lazy or (self.half and not self._rounds_in_kernel(weight)):
            super().update_from_pairs(name, weight, pairs, clip=clip, lr=lr, unit_rows=unit_rows)
            return
        first, second = self.moments["first"][name], self.moments["second"][name]
        pairs.update(weight, first, second, self.adam_step(clip, lr, unit_rows), kernels=self.kernels)

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        whole = (weight, self.moment("first", name), self.moment("second", name))
        step = self.adam_step(clip, lr, unit_rows)
        in_tiles = self.half and not self._rounds_in_kernel(weight)
        generator = torch.Generator(weight.device).manual_seed(self.step_number) if in_tiles else None
        if not self.config.lazy:
            self._update(*whole, grad, step, generator)
            return
        axis = 1 if self.parameters[name].ndim == 1 else 0  # a vector is one row
        moving_R = (grad != 0).any(1 - axis).nonzero().squeeze(1)
        if not len(moving_R):
            return
        for part_R in moving_R.split(max(1, GATHERED_ELEMENTS // weight.shape[1 - axis])):
            weight_part, first, second, grad_part = (t.index_select(axis, part_R) for t in (*whole, grad))
            self._update(weight_part, first, second, grad_part, step, generator)
            for tensor, moved in zip(whole, (weight_part, first, second), strict=True):
                tensor.index_copy_(axis, part_R, moved)

    def _update(
        self,
        weight: Tensor,
        first: Tensor,
        second: Tensor,
        grad: Tensor,
        step: AdamStep,
        generator: torch.Generator | None,
    ) -> None:
        """``row_update``, by way of float32 tiles where a generator says how moments in bfloat16 are rounded."""
        if generator is None:
            row_update(weight, grad, first, second, step, kernels=self.kernels)
            return
        # In tiles, so that no float32 copy of all moments exists.
        rows = max(1, TILE_ELEMENTS // weight.shape[1])
        for start in range(0, len(weight), rows):
            tile = slice(start, start + rows)
            moments = [moment[tile].to(weight.dtype) for moment in (first, second)]
            row_update(weight[tile], grad[tile], moments[0], moments[1], step, kernels=self.kernels)
            for kept, moment in zip((first, second), moments, strict=True):
                kept[tile] = round_stochastically(moment, generator)

    def _rounds_in_kernel(self, weight: Tensor) -> bool:
        """Whether a kernel takes bfloat16 moments as they are: no float32 tile of them is ever made."""
        return resolve(self.kernels, weight) == "triton"


def round_stochastically(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """float32 to one of the two nearest bfloat16, which is right on average."""
    bits = values.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).bfloat16()
