"""What Llamascopium's MoLTs and Lorsas have alike: activation, scales, bias, provenance."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from shared.sae.config import DictionaryConfig
from shared.sae.formats.source import Tensors
from shared.sae.sites import Sites, SiteWidths

NORM = "dataset_average_activation_norm"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a folder says of one dictionary, beside what its kind has of its own."""

    d: int
    activation: str
    k: int | None
    scales: tuple[float, float] | None
    """Of what is read and of what is written; None: raw activations."""
    unit_norms: bool
    """Whether latents are chosen by their decoder's norm times their value: here it is 1, and in the encoder."""
    b_dec: Tensor
    provenance: dict[str, Any]

    def thresholds(self, found: Tensors, f: int) -> dict[str, Tensor]:
        """Those of a jumprelu's latents, by this project's name."""
        if self.activation != "jumprelu":
            return {}
        name = "activation_function.log_jumprelu_threshold"
        return {"activation.log_threshold": found.take({name: (f,)})[0]}

    def config(self, kind: type[DictionaryConfig], own: Mapping[str, Any]) -> DictionaryConfig:
        """Make the configuration that this project has of it, with the kind's own fields."""
        sites = Sites.from_provenance(self.provenance)
        fields = {
            **own,
            "k": self.k,
            "activation": self.activation,
            "normalisation": "none" if self.scales is None else "scale",
            "pre_bias": False,
            "unit_norm_decoder": self.unit_norms,
        }
        widths = SiteWidths((self.d,), (self.d,))
        return kind.of(widths, fields, None if sites is None else replace(sites, unit=kind.unit))

    def tensors(self) -> dict[str, Tensor]:
        """Bias and normalisation."""
        ones, (read, written) = torch.ones(()), self.scales or (1.0, 1.0)
        return {
            "b_dec": self.b_dec,
            **{f"{side}_mean": torch.zeros(self.d) for side in ("input", "output")},
            **{f"{side}_variance": torch.ones(self.d) for side in ("input", "output")},
            "input_scale": ones * read,
            "output_scale": ones * written,
        }

    def at(self, sites: Sites) -> Self:
        """The same at these sites."""
        known = {name: value for name, value in self.provenance.items() if name not in ("hook", "reads", "writes")}
        return replace(self, provenance={**known, **sites.record()})
