"""What a crosscoder of two sites says of their difference: whose each latent is, and whether that is so.

Norms and activations are in normalised units, in which both sites weigh alike. Shapes: N tokens, K picks per token,
F latents, D width of a site. Index 0 is the first written site, 1 the second.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.basics.errors import GranaryError
from shared.kernels import add_at, decode, dot_picks
from shared.sae.latents import SparseLatents
from shared.sae.variants.crosscoder import Crosscoder

# Relative norms below which a latent is the first site's, from which to which it is shared, above which the second's.
CUTS = (0.1, 0.4, 0.6, 0.9)
# A latent is specific to its site if the other's share is below these (Minder et al. 2025, 2504.02922).
MOST_RECONSTRUCTION, MOST_ERROR = 0.5, 0.2


def check_pair(crosscoder: Crosscoder) -> None:
    """Raise GranaryError unless it writes two sites of one width."""
    writes = crosscoder.widths.writes
    if len(writes) != 2 or writes[0] != writes[1]:
        raise GranaryError(f"differences are between two sites of one width, not {', '.join(map(str, writes))}")


@torch.no_grad()
def relative_norms(crosscoder: Crosscoder) -> Tensor:
    """``(1 + (n_1 - n_0) / max(n_0, n_1)) / 2`` [F]: 0 for a latent of the first site alone, 1 of the second."""
    check_pair(crosscoder)
    first_F, second_F = crosscoder.site_norms()
    return 0.5 * (1 + (second_F - first_F) / torch.maximum(first_F, second_F).clamp_min(1e-30))


@torch.no_grad()
def cosines(crosscoder: Crosscoder) -> Tensor:
    """Cosine of each latent's decoder rows at the two sites, [F]."""
    check_pair(crosscoder)
    first_FD, second_FD = crosscoder.W_dec.split(crosscoder.widths.writes, dim=1)
    return F.cosine_similarity(first_FD, second_FD, dim=1)


class LatentScaling:
    """How much of each site a latent explains, for all latents in one pass (2504.02922, equation 4).

        beta_j(y) = <d_j, sum_n f_nj y_n> / (|d_j|^2 sum_n f_nj^2)

    is the best factor of ``f_j d_j`` for y, where d_j is the decoder row of j's owner, the site of its larger norm. y
    is a site's reconstruction, or its error with the latent's own part put back. nu is the ratio of the other site's
    beta to the owner's.
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        check_pair(crosscoder)
        self.crosscoder = crosscoder
        with torch.no_grad():
            first_FD, second_FD = crosscoder.W_dec.split(crosscoder.widths.writes, dim=1)
            self.parts_FD = [first_FD.contiguous(), second_FD.contiguous()]
            self.owner_F = crosscoder.site_norms().argmax(0)
            self.rows_FD = torch.where(self.owner_F[:, None] == 0, first_FD, second_FD)
        zeros_SF = torch.zeros(2, len(self.owner_F), dtype=torch.float64, device=self.owner_F.device)
        self.sums = {"reconstruction_SF": zeros_SF, "error_SF": zeros_SF.clone(), "square_F": zeros_SF[0].clone()}
        """sum_n f_nj <d_j, y_n> of each site for both y, and sum_n f_nj^2: those of parts of the data add up."""

    @torch.no_grad()
    def add(self, x_ND: Tensor, y_ND: Tensor, latents: SparseLatents) -> None:
        """Count tokens: raw activations that are read and written, and the latents of the former, [N, K]."""
        made = self.crosscoder
        normal_ND, _, _ = made.normalise(x_ND)
        values_NK, indices_NK = latents.values, latents.indices
        targets = made.target(y_ND, normal_ND).split(made.widths.writes, dim=1)
        biases = made.b_dec.split(made.widths.writes)
        kept = indices_NK >= 0
        chosen_P = indices_NK[kept]
        for site, (target_ND, part_FD, bias_D) in enumerate(zip(targets, self.parts_FD, biases, strict=True)):
            hat_ND = decode(values_NK, indices_NK, part_FD, kernels=made.kernels) + bias_D
            for name, y in (("reconstruction_SF", hat_ND), ("error_SF", target_ND - hat_ND)):
                dots_NK = dot_picks(y.contiguous(), indices_NK, self.rows_FD, kernels=made.kernels)
                add_at(self.sums[name][site], chosen_P, (values_NK * dots_NK)[kept].double())
        add_at(self.sums["square_F"], chosen_P, values_NK[kept].double().square())

    def betas(self) -> tuple[Tensor, Tensor]:
        """beta of reconstruction and of error, [2, F] each; NaN for latents that never fired."""
        square_F = self.sums["square_F"]
        rows_FD = self.rows_FD.double().to(square_F.device)
        scale_F = rows_FD.square().sum(1) * square_F
        own_SF = torch.stack([(rows_FD * part_FD.to(rows_FD)).sum(1) * square_F for part_FD in self.parts_FD])
        scale_F = torch.where(scale_F > 0, scale_F, torch.nan)
        return self.sums["reconstruction_SF"] / scale_F, (self.sums["error_SF"] + own_SF) / scale_F

    def nus(self) -> tuple[Tensor, Tensor]:
        """nu of reconstruction and of error, [F]: near 0 for a latent of one site alone, near 1 for a shared one."""
        place_1F = self.owner_F[None].to(self.sums["square_F"].device)
        reconstruction, error = (
            (beta_SF.gather(0, 1 - place_1F) / beta_SF.gather(0, place_1F))[0] for beta_SF in self.betas()
        )
        return reconstruction, error

    def specific(self) -> Tensor:
        """bool [F]: latents that only their own site has, by both ratios."""
        reconstruction_F, error_F = self.nus()
        return (reconstruction_F.abs() < MOST_RECONSTRUCTION) & (error_F.abs() < MOST_ERROR)
