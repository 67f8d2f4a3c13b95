"""The registry of optimisers, and the one that needs another package."""

from collections.abc import Mapping

import torch
from torch import Tensor

from shared.errors import GranaryError
from shared.kernels import AdamStep, row_update
from shared.sae.optim import (
    MATRICES,
    SAEAdam,
    SAEMuon,
    SAEOptimiser,
    SAESignum,
    Trained,
    check_betas,
    project,
    renormalise,
)

# Entries that share one scale, in bitsandbytes' kernels.
BLOCK = 256


class SAEAdam8bit(SAEOptimiser):
    """Adam with the moments of both matrices in 8 bits and a scale per 256 entries (Dettmers et al. 2022).

    By bitsandbytes' kernels. Moments of vectors stay in float32, as they do there.
    """

    kinds = ("first", "second", "first_scale", "second_scale")

    def __init__(
        self,
        sae: Trained,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        factors: Mapping[str, float] | None = None,
        clip_norm: float | None = 1.0,
        pair_gradients: bool = False,
    ) -> None:
        """Raises GranaryError without bitsandbytes, and for matrices that are no whole number of blocks."""
        try:
            from bitsandbytes.functional import create_dynamic_map
        except ImportError as error:
            raise GranaryError(
                "optim=adam8bit needs bitsandbytes: pip install bitsandbytes, or use optim.moments=bfloat16"
            ) from error
        check_betas(betas)
        super().__init__(sae, lr, factors=factors, clip_norm=clip_norm, pair_gradients=pair_gradients)
        self.betas, self.eps = betas, eps
        device = self.parameters["W_enc"].device
        self.maps = tuple(create_dynamic_map(signed=signed).to(device) for signed in (True, False))
        """Values of the 256 codes: signed for the first moment."""

    def new_moment(self, kind: str, name: str, parameter: Tensor) -> Tensor | None:
        if name not in MATRICES:
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
        if name not in MATRICES:
            adam = AdamStep(lr, self.betas, self.eps, self.step_number, clip, unit_rows=False)
            row_update(weight, grad, first, second, adam, kernels=self.kernels)
            return
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            project(grad * clip, weight, unit_rows),
            weight,
            first,
            second,
            *self.betas,
            0.0,  # of another optimiser
            0.0,
            self.eps,
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


OPTIMISERS: dict[str, type[SAEOptimiser]] = {
    "adam": SAEAdam,
    "adam8bit": SAEAdam8bit,
    "muon": SAEMuon,
    "signum": SAESignum,
}
