"""From sums to the metrics of reconstruction and sparsity. Formulas and their sources: docs/metrics.md.

Legend: D width of what is written, F d_latent, C evaluated contexts, G groups of a breakdown.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage_eval.measure.confidence import Estimate, ratio_of_sums
from stage_eval.measure.sums import CONTEXT_FIELDS, ReconstructionSums
from stage_eval.results.figures import (
    DenseLatent,
    FrequencyHistogram,
    LatentFigures,
    Reconstruction,
    SiteFigures,
    WithBos,
)

# A latent that fires on more than this share of tokens says little about any of them (Llama Scope uses the same bound).
DENSE_FREQUENCY = 0.1
HISTOGRAM_BINS_PER_DECADE = 4


def reconstruction_figures(sums: ReconstructionSums, sites: Mapping[str, slice] | None = None) -> Reconstruction:
    """Reconstruction and sparsity from the sums of all ranks (on the CPU).

    `sites` says which columns belong to which written site; figures of each are given where there are several.
    """
    table = {name: sums.added["context"][:, column].numpy() for column, name in enumerate(CONTEXT_FIELDS)}
    tokens_C = table["tokens"]
    num_tokens = float(tokens_C.sum())
    shift_to_mean_D = sums.added["deviation_D"] / num_tokens
    offset = float(shift_to_mean_D.square().sum())
    # Summed over contexts this is exactly the scatter about the mean of the evaluated tokens.
    scatter_C = table["spread"] - tokens_C * offset

    estimates: dict[str, Estimate] = {
        "fvu": ratio_of_sums(table["error"], scatter_C),
        "fvu_uncentred": ratio_of_sums(table["error"], table["energy"]),
        "mse_per_token": ratio_of_sums(table["error"], tokens_C),
        "cosine": ratio_of_sums(table["cosine"], tokens_C),
        "relative_norm": ratio_of_sums(table["norm_ratio"], tokens_C),
        "reconstruction_bias": ratio_of_sums(table["energy_hat"], table["overlap"]),
        "l0": ratio_of_sums(table["l0"], tokens_C),
        "l1": ratio_of_sums(table["l1"], tokens_C),
    }
    scatter_D = (sums.added["spread_D"] - num_tokens * shift_to_mean_D.square()).clamp_min(0)
    for name, complement in (("explained_variance", "fvu"), ("explained_variance_uncentred", "fvu_uncentred")):
        estimates[name] = estimates[complement].complement()
    value = {name: estimate.value for name, estimate in estimates.items()}
    by_dimension = per_dimension(sums.added["error_D"], scatter_D)
    return Reconstruction(
        fvu=value["fvu"],
        fvu_uncentred=value["fvu_uncentred"],
        mse_per_token=value["mse_per_token"],
        cosine=value["cosine"],
        relative_norm=value["relative_norm"],
        reconstruction_bias=value["reconstruction_bias"],
        l0=value["l0"],
        l1=value["l1"],
        explained_variance=value["explained_variance"],
        explained_variance_uncentred=value["explained_variance_uncentred"],
        fvu_per_dimension_mean=by_dimension.mean,
        explained_variance_per_dimension_mean=1 - by_dimension.mean,
        constant_dimensions=by_dimension.constant,
        mse=value["mse_per_token"] / len(scatter_D),
        mean_error_norm=float((sums.added["residual_D"] / num_tokens).norm()),
        with_bos=with_bos(sums, float(table["error"].sum()), float(table["energy"].sum())),
        n_tokens=int(num_tokens),
        n_contexts=int((tokens_C > 0).sum()),
        confidence95={name: estimate.interval for name, estimate in estimates.items()},
        sites=per_site(sums.added["error_D"], scatter_D, sites, num_tokens) if sites and len(sites) > 1 else None,
    )


@dataclass(frozen=True)
class PerDimension:
    """Mean over dimensions of each dimension's own FVU; one that never varies has none and is counted apart."""

    mean: float
    constant: int


def per_dimension(error_D: Tensor, scatter_D: Tensor) -> PerDimension:
    """FVU of every dimension, averaged."""
    varies_D = scatter_D > 0
    fvu_D = error_D[varies_D] / scatter_D[varies_D]
    return PerDimension(float(fvu_D.mean()) if len(fvu_D) else math.nan, int((~varies_D).sum()))


def per_site(
    error_D: Tensor, scatter_D: Tensor, sites: Mapping[str, slice], num_tokens: float
) -> dict[str, SiteFigures]:
    """FVU and MSE of each written site by itself."""
    figures = {}
    for name, columns in sites.items():
        error, scatter = float(error_D[columns].sum()), float(scatter_D[columns].sum())
        width = columns.stop - columns.start
        figures[name] = SiteFigures(fvu=error / scatter if scatter > 0 else None, mse=error / num_tokens / width)
    return figures


def with_bos(sums: ReconstructionSums, error: float, energy: float) -> WithBos | None:
    """FVU when BOS positions are counted too, centred on the mean of all of them; None when there are none."""
    bos_tokens, bos_error, bos_energy, bos_spread = sums.added["bos"].tolist()
    if bos_tokens == 0:
        return None
    count = float(sums.added["context"][:, CONTEXT_FIELDS.index("tokens")].sum()) + bos_tokens
    mean_D = (sums.added["deviation_D"] + sums.added["bos_deviation_D"]) / count
    spread = float(sums.added["context"][:, CONTEXT_FIELDS.index("spread")].sum()) + bos_spread
    return WithBos(
        fvu=(error + bos_error) / (spread - count * float(mean_D.square().sum())),
        fvu_uncentred=(error + bos_error) / (energy + bos_energy),
        bos_fvu_uncentred=bos_error / bos_energy if bos_energy > 0 else math.nan,
        n_bos=int(bos_tokens),
        n_tokens=int(count),
    )


def fvu_breakdown(sums_G3: Tensor) -> tuple[list[int], list[float | None]]:
    """Tokens and FVU of every group; the variance is taken about the training mean, one reference for all groups."""
    tokens_G, error_G, spread_G = sums_G3.unbind(1)
    fvu_G = torch.where(spread_G > 0, error_G / spread_G, math.nan)
    return tokens_G.long().tolist(), fvu_G.tolist()


def latent_figures(sums: ReconstructionSums, num_tokens: int) -> LatentFigures:
    """Dead and dense shares, the histogram of log10 firing frequency, and the mass that each bin carries."""
    firings_F = sums.added["firings_F"]
    frequency_F = firings_F.double() / num_tokens
    alive_F = firings_F > 0
    dense_F = frequency_F > DENSE_FREQUENCY
    firings = float(firings_F.sum())
    mean_when_active = sums.added["activation_F"][alive_F] / firings_F[alive_F]
    return LatentFigures(
        d_latent=len(firings_F),
        dead=int((~alive_F).sum()),
        dense=int(dense_F.sum()),
        dead_fraction=float((~alive_F).double().mean()),
        dense_fraction=float(dense_F.double().mean()),
        dense_frequency_bound=DENSE_FREQUENCY,
        firings_of_dense_latents=float(firings_F[dense_F].sum()) / firings if firings else 0.0,
        median_frequency_alive=float(frequency_F[alive_F].median()) if alive_F.any() else None,
        mean_activation_when_active=float(mean_when_active.mean()) if alive_F.any() else None,
        max_activation=float(sums.maxed["activation_max_F"].max()),
        densest=densest(frequency_F, sums),
        histogram=frequency_histogram(frequency_F, sums.added["activation_squared_F"], num_tokens),
    )


def per_latent_figures(sums: ReconstructionSums) -> dict[str, Tensor]:
    """What ``latents.safetensors`` holds: for each latent, on the evaluated tokens, [F]."""
    firings_F = sums.added["firings_F"]
    return {
        "firings": firings_F,
        "mean_activation": (sums.added["activation_F"] / firings_F.clamp_min(1)).float(),
        "max_activation": sums.maxed["activation_max_F"].float(),
    }


def densest(frequency_F: Tensor, sums: ReconstructionSums, count: int = 10) -> list[DenseLatent]:
    """The latents that fire most often."""
    top = torch.topk(frequency_F, min(count, len(frequency_F)))
    rows = []
    for frequency, latent in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if frequency == 0:
            break
        mean = float(sums.added["activation_F"][latent] / sums.added["firings_F"][latent])
        rows.append(DenseLatent(latent=latent, frequency=frequency, mean_activation=mean))
    return rows


def frequency_histogram(frequency_F: Tensor, energy_F: Tensor, num_tokens: int) -> FrequencyHistogram:
    """Latents per bin of log10 firing frequency, and the share of all squared activation that each bin carries.

    The lowest bin holds one firing in `num_tokens`; dead latents have no frequency and are left out.
    """
    lowest = math.floor(math.log10(1 / max(num_tokens, 1)))
    edges = np.linspace(lowest, 0, -lowest * HISTOGRAM_BINS_PER_DECADE + 1) if lowest < 0 else np.array([-1.0, 0.0])
    alive_F = frequency_F > 0
    logs = frequency_F[alive_F].log10().numpy()
    energy = energy_F[alive_F].numpy()
    counts, _ = np.histogram(logs, bins=edges)
    mass, _ = np.histogram(logs, bins=edges, weights=energy)
    total = float(energy.sum())
    return FrequencyHistogram(
        log10_edges=edges.tolist(),
        latents=counts.tolist(),
        energy_share=(mass / total if total else mass).tolist(),
    )
