"""Signum: the sign of the momentum."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from shared.sae.optim.base import Optimiser, OptimiserConfig, project, renormalise


@dataclass(frozen=True, kw_only=True)
class SignumConfig(OptimiserConfig):
    """Options of ``Signum``."""

    kind: ClassVar[str] = "signum"

    momentum: float = 0.9
    """Decay of the momentum, per step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_decay("momentum")


class Signum(Optimiser):
    """The sign of the momentum (Bernstein et al. 2018): every entry moves by lr."""

    config_type = SignumConfig
    kinds = ("first",)
    config: SignumConfig

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first = self.moment("first", name)
        first.lerp_(project(grad * clip, weight, unit_rows), 1 - self.config.momentum)
        weight.sub_(first.sign(), alpha=lr)
        renormalise(weight, unit_rows)
