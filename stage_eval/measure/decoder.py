"""How the decoder directions lie to one another.

Legend: F d_latent, D d_model, S sampled latents, R rows of a block.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from stage_eval.results.figures import DecoderFigures

SAMPLE = 2048
BLOCK = 256
BINS = 40
DUPLICATE_COSINE = 0.9


def decoder_figures(W_dec_FD: Tensor, W_enc_FD: Tensor | None, seed: int) -> DecoderFigures:
    """Nearest-neighbour cosines of (a sample of) the latents' decoder directions, with a random baseline.

    `W_enc_FD`: the encoder's rows, where they live in the space of the decoder's; None elsewhere.
    The baseline is exact: for F independent uniform directions in D dimensions, the share of latents whose nearest
    neighbour falls into each bin.
    """
    directions_FD = F.normalize(W_dec_FD, dim=1)
    count, width = directions_FD.shape
    generator = torch.Generator().manual_seed(seed)
    sample_S = torch.randperm(count, generator=generator)[:SAMPLE].sort().values.to(directions_FD.device)
    nearest = []
    for rows_R in torch.split(sample_S, BLOCK):
        cosine_RF = directions_FD[rows_R] @ directions_FD.T
        cosine_RF[torch.arange(len(rows_R), device=rows_R.device), rows_R] = -1.0
        nearest.append(cosine_RF.max(dim=1).values)
    nearest_S = torch.cat(nearest).clamp(-1, 1).double().cpu()
    edges = np.linspace(min(0.0, math.floor(20 * float(nearest_S.min())) / 20), 1.0, BINS + 1)
    shares, _ = np.histogram(nearest_S.numpy(), bins=edges)
    cosine = None if W_enc_FD is None else float(F.cosine_similarity(directions_FD, W_enc_FD, dim=1).mean())
    return DecoderFigures(
        sampled=len(nearest_S),
        edges=edges.tolist(),
        nearest=(shares / len(nearest_S)).tolist(),
        nearest_random=random_nearest(edges, count, width),
        nearest_median=float(nearest_S.median()),
        duplicates=float((nearest_S > DUPLICATE_COSINE).double().mean()),
        duplicate_cosine=DUPLICATE_COSINE,
        encoder_cosine_mean=cosine,
    )


def random_nearest(edges: npt.NDArray[np.float64], count: int, width: int) -> list[float]:
    """Share per bin of the largest of count - 1 cosines between independent directions in `width` dimensions.

    A cosine c has density proportional to (1 - c^2)^((width - 3) / 2); the largest of n has distribution P(c)^n.
    """
    if width < 2 or count < 2:
        return [0.0] * (len(edges) - 1)
    angles = np.linspace(0, np.pi, 200_001)  # c = cos(angle): density sin(angle)^(width - 2), smooth at both ends
    density = np.sin(angles) ** (width - 2)
    beyond = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    survival = np.interp(np.arccos(np.clip(edges, -1, 1)), angles, beyond / beyond[-1])
    with np.errstate(divide="ignore"):
        below = np.exp((count - 1) * np.log1p(-survival))
    return [float(share) for share in np.diff(below)]
