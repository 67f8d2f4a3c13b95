"""What all passes of one evaluation share, and how a dictionary is held while they run."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.parallel import World
from shared.sae.sites import Sites, SiteWidths
from shared.sae.variants import Dictionary
from shared.store import HookStatistics, Store
from stage_eval.measure.data import EvaluationData, units


@dataclass(frozen=True)
class PassSettings:
    """How the passes run."""

    unit_contexts: int
    """Contexts per forward of the language model."""
    splice_bos: bool
    """Replace the activation of BOS as well."""
    joint: bool
    """Also splice all dictionaries of a pass at once."""


@dataclass(frozen=True)
class Session:
    """The world of processes, the store, the contexts to evaluate on, the statistics of each site, and the settings."""

    world: World
    store: Store
    data: EvaluationData
    statistics: Mapping[str, HookStatistics]
    settings: PassSettings

    def units(self) -> list[tuple[int, int]]:
        """This rank's ranges of contexts."""
        return units(len(self.data.contexts), self.settings.unit_contexts, self.world)

    def mean(self, site: str) -> Tensor:
        """Mean of a site over the store's training tokens, float64 [D] on this rank's device."""
        return torch.from_numpy(self.statistics[site].mean).to(self.world.device)


@dataclass(frozen=True)
class Loaded:
    """A dictionary in memory, and where it reads and writes."""

    label: str
    """Name of the condition in which it is spliced into the language model."""
    sites: Sites
    widths: SiteWidths
    dictionary: Dictionary

    @property
    def d_latent(self) -> int:
        """Number of latents."""
        return self.dictionary.config.d_latent
