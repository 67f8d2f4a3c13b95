"""What a crosscoder of two sites says of their difference, over the evaluated tokens. Definitions: docs/metrics.md.

Legend: N tokens, F latents.
"""

from typing import Self

import torch
from torch import Tensor

from shared.sae.diffing import CUTS, MOST_ERROR, MOST_RECONSTRUCTION, LatentScaling, cosines, relative_norms
from shared.sae.latents import SparseLatents
from shared.sae.variants import Crosscoder, Dictionary
from stage_eval.measure.sums import Sums
from stage_eval.results.figures import DiffFigures

BINS = 20


class DiffSums(Sums):
    """The sums of latent scaling, which add up over ranks."""

    def __init__(self, crosscoder: Crosscoder) -> None:
        super().__init__()
        self.crosscoder, self.scaling = crosscoder, LatentScaling(crosscoder)
        self.added = self.scaling.sums

    @classmethod
    def of(cls, dictionary: Dictionary) -> Self | None:
        """Make the sums for a crosscoder of two sites of one width; None for other dictionaries."""
        writes = dictionary.widths.writes
        if not isinstance(dictionary, Crosscoder) or len(writes) != 2 or writes[0] != writes[1]:
            return None
        return cls(dictionary)

    def add(self, x_ND: Tensor, y_ND: Tensor, latents: SparseLatents) -> None:
        """Add N evaluated tokens."""
        self.scaling.add(x_ND, y_ND, latents)

    def per_latent(self) -> dict[str, Tensor]:
        """What ``latents.safetensors`` holds of them, [F]; NaN for latents that never fired."""
        reconstruction_F, error_F = self.scaling.nus()
        return {
            "relative_norm": relative_norms(self.crosscoder).cpu(),
            "decoder_cosine": cosines(self.crosscoder).cpu(),
            "nu_reconstruction": reconstruction_F.float(),
            "nu_error": error_F.float(),
        }


def diff_figures(sums: DiffSums, alive_F: Tensor, names: tuple[str, ...]) -> DiffFigures:
    """Compute the figures of the latents that fired, on rank 0 with the sums of all ranks."""
    found = {name: values_F[alive_F] for name, values_F in sums.per_latent().items()}
    norm_A, specific_A = found["relative_norm"], sums.scaling.specific().cpu()[alive_F]
    only_first, shared_from, shared_to, only_second = CUTS
    edges = torch.linspace(0, 1, BINS + 1)
    is_first, is_second = norm_A < only_first, norm_A > only_second
    is_shared = (norm_A >= shared_from) & (norm_A <= shared_to)
    return DiffFigures(
        first=names[0],
        second=names[1],
        alive=len(norm_A),
        only_first=int(is_first.sum()),
        only_second=int(is_second.sum()),
        shared=int(is_shared.sum()),
        between=int((~(is_first | is_second | is_shared)).sum()),
        specific_first=int((specific_A & (norm_A < 0.5)).sum()),
        specific_second=int((specific_A & (norm_A > 0.5)).sum()),
        cuts=list(CUTS),
        most_nu_reconstruction=MOST_RECONSTRUCTION,
        most_nu_error=MOST_ERROR,
        shared_cosine_mean=float(found["decoder_cosine"][is_shared].mean()) if is_shared.any() else None,
        edges=edges.tolist(),
        latents=torch.histogram(norm_A.float(), edges).hist.long().tolist(),
    )
