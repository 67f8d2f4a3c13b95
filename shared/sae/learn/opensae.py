"""A dictionary in training with the calls and names of OpenSAE's ``forward`` (its ``SaeForwardOutput``)."""

from dataclasses import dataclass

from torch import Tensor, nn

from shared.sae.latents import SAEOutput
from shared.sae.learn.inputs import Losses, StepInputs
from shared.sae.learn.objective import Objective


@dataclass(frozen=True, slots=True)
class OpenSAEOutput(SAEOutput):
    """Reconstruction and latents, and the losses where they were asked for."""

    losses: Losses | None = None

    @property
    def loss(self) -> Tensor | None:
        """``losses.total``: call its ``backward``."""
        return None if self.losses is None else self.losses.total

    @property
    def reconstruction_loss(self) -> Tensor | None:
        """``losses.reconstruction``."""
        return None if self.losses is None else self.losses.reconstruction

    @property
    def auxk_loss(self) -> Tensor | None:
        """The AuxK loss; None where it is off or nothing is dead."""
        return self._part("auxk")

    @property
    def multi_topk_loss(self) -> Tensor | None:
        """The Multi-TopK loss; None where it is off."""
        return self._part("multi_topk")

    @property
    def l1_loss(self) -> Tensor | None:
        """The sparsity penalty, before its weight; None where there is none."""
        return self._part("penalty")

    def _part(self, name: str) -> Tensor | None:
        return None if self.losses is None else self.losses.metrics.get(name)


class OpenSAEForward(nn.Module):
    """Calls an objective's dictionary as OpenSAE calls its SAE."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(
        self,
        x: Tensor,
        dead: Tensor | None = None,
        *,
        return_losses: bool = False,
        return_all_features: bool = False,
    ) -> OpenSAEOutput:
        """Encode and decode x [..., D], without gradient; with `return_losses` also its losses, with gradient."""
        dictionary = self.objective.dictionary
        latents = dictionary.encode(x, return_all_features=return_all_features)
        losses = None
        if return_losses:
            losses = self.objective.losses(x.reshape(-1, x.shape[-1]), inputs=StepInputs(dead=dead))
        return OpenSAEOutput(dictionary.decode(latents), latents, losses)
