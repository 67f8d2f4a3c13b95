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
        if self.half and not self._rounds_in_kernel(weight):
            super().update_from_pairs(name, weight, pairs, clip=clip, lr=lr, unit_rows=unit_rows)
            return
        first, second = self.moments["first"][name], self.moments["second"][name]
        pairs.update(weight, first, second, self.adam_step(clip, lr, unit_rows), kernels=self.kernels)

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first, second = self.moment("first", name), self.moment("second", name)
        if not self.half or self._rounds_in_kernel(weight):
            self.adam(weight, grad, first, second, clip=clip, lr=lr, unit_rows=unit_rows)
            return
        # In tiles, so that no float32 copy of the moments exists.
        rows = max(1, TILE_ELEMENTS // weight.shape[1])
        generator = torch.Generator(weight.device).manual_seed(self.step_number)
        for start in range(0, len(weight), rows):
            tile = slice(start, start + rows)
            moments = [moment[tile].to(weight.dtype) for moment in (first, second)]
            self.adam(weight[tile], grad[tile], *moments, clip=clip, lr=lr, unit_rows=unit_rows)
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
