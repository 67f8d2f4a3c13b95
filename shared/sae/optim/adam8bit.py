"""Adam with moments in 8 bits, by another package's kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.optim.adam import MomentsConfig, WithMoments
from shared.sae.optim.base import OptimiserConfig, project, renormalise
from shared.sae.roles import Role

# Entries that share one scale, in bitsandbytes' kernels.
BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Adam8bitConfig(MomentsConfig):
    """Options of ``Adam8bit``."""

    kind: ClassVar[str] = "adam8bit"


class Adam8bit(WithMoments):
    """Adam with the moments of the matrices in 8 bits and a scale per 256 entries (Dettmers et al. 2022).

    By bitsandbytes' kernels. Moments of vectors stay in float32, as they do there.
    """

    config_type = Adam8bitConfig
    kinds = ("first", "second", "first_scale", "second_scale")
    by_element = False
    config: Adam8bitConfig

    def __init__(
        self, parameters: Mapping[str, Tensor], roles: Mapping[str, Role], config: OptimiserConfig, **options: Any
    ) -> None:
        """Raises GranaryError without bitsandbytes, and for matrices that are no whole number of blocks."""
        try:
            from bitsandbytes.functional import create_dynamic_map
        except ImportError as error:
            raise GranaryError(
                "optim=adam8bit needs bitsandbytes: pip install bitsandbytes, or use optim.moments=bfloat16"
            ) from error
        super().__init__(parameters, roles, config, **options)
        device = next(iter(self.parameters.values())).device
        self.maps = tuple(create_dynamic_map(signed=signed).to(device) for signed in (True, False))
        """Values of the 256 codes: signed for the first moment."""

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        if not self.roles[name].is_matrix:
            return None if kind.endswith("scale") else torch.zeros_like(parameter)
        if parameter.numel() % BLOCK:
            raise GranaryError(
                f"optim=adam8bit keeps one scale per {BLOCK} entries, which {list(parameter.shape)} of {name} on one "
                "process is no multiple of: change sae.expansion, or use optim=adam"
            )
        if kind.endswith("scale"):
            return torch.zeros(parameter.numel() // BLOCK, device=parameter.device)
        return torch.zeros_like(parameter, dtype=torch.uint8)

    def update(self, name: str, weight: Tensor, grad: Tensor, *, clip: Tensor, lr: float, unit_rows: bool) -> None:
        first, second = self.moment("first", name), self.moment("second", name)
        if not self.roles[name].is_matrix:
            self.adam(weight, grad, first, second, clip=clip, lr=lr, unit_rows=unit_rows)
            return
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            project(grad * clip, weight, unit_rows),
            weight,
            first,
            second,
            self.config.beta1,
            self.config.beta2,
            0.0,  # of another optimiser
            0.0,
            self.config.eps,
            self.step_number,
            lr,
            *self.maps,
            self.moments["first_scale"][name],
            self.moments["second_scale"][name],
            0.0,
            1.0,
            False,
        )
        renormalise(weight, unit_rows)
