"""The crosscoder (Lindsey et al. 2024): one set of latents for several sites, of one model or of two.

    z = sum_s W_enc,s x~_s + b_enc;   f = activation(z);   y^_t = denormalise(sum_i f_i W_dec,t[i] + b_dec,t)

With its sites side by side that is an SAE of their summed width: each site has a scale of its own in the normalisation
and counts alike in the loss. A latent's row of W_dec lies over all sites and has unit norm as a whole, its joint norm.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.sae.activation_kinds import ACTIVATION_KINDS
from shared.sae.config import DictionaryConfig
from shared.sae.sites import SiteWidths
from shared.sae.variants.one_group import OneGroup

GATES = ("joint", "sum")


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig(DictionaryConfig):
    """A crosscoder of several sites; one is an SAE."""

    kind: ClassVar[str] = "crosscoder"
    width_fields: ClassVar[tuple[str, ...]] = ("read_widths", "write_widths")

    read_widths: tuple[int, ...]
    """Of each site that is read."""
    write_widths: tuple[int, ...]
    """Of each site that is written."""
    gate: str = "joint"
    """What a latent counts where k are chosen, and in the sparsity penalties: f times the norm of its whole decoder row
    (joint), or times the sum of the norms of its parts (sum), which favours latents of several sites by up to the root
    of their number. What is decoded is f itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in GATES:
            raise GranaryError(f"variant.gate={self.gate!r}: choose from {', '.join(GATES)}")
        if self.normalisation == "layer_norm" and len(self.read_widths) > 1:
            raise GranaryError(
                "sae.normalisation=layer_norm is for one site: side by side, one site's tokens would scale the other's;"
                " use centre_scale, scale or none"
            )

    @property
    def widths(self) -> SiteWidths:
        """Any number of sites on each side."""
        return SiteWidths(self.read_widths, self.write_widths)

    @property
    def is_autoencoder(self) -> bool:
        """Where both sides are the same places."""
        return self.sites.is_autoencoder if self.sites is not None else self.read_widths == self.write_widths

    @classmethod
    def from_widths(cls, widths: SiteWidths) -> dict[str, Any]:
        """Any widths."""
        return {"read_widths": widths.reads, "write_widths": widths.writes}


class Crosscoder(OneGroup):
    """A crosscoder as its config describes it; random until it is learnt or ``from_pretrained``."""

    config_class: ClassVar[type[DictionaryConfig]] = CrosscoderConfig
    config: CrosscoderConfig

    def site_norms(self) -> Tensor:
        """Norm of each latent's decoder row at each written site, [T, F]."""
        return torch.stack([part.norm(dim=1) for part in self.W_dec.split(self.widths.writes, dim=1)])

    def choice_norm(self) -> Tensor | None:
        """Return, under ``gate=sum``, the sum over sites of a row's norms."""
        if self.config.gate == "joint" or not ACTIVATION_KINDS[self.config.activation].fixes_l0:
            return None
        return self.site_norms().sum(0).detach()

    def decoder_norm(self) -> Tensor | None:
        """Return what the gate says."""
        return self.site_norms().sum(0) if self.config.gate == "sum" else super().decoder_norm()
