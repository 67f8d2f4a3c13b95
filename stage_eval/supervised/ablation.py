"""Latents taken out of what a linear probe reads, the dictionary's error kept: of a linear probe the logit alone moves.

    y' = y - sum over ablated l of a_l d_l        w . y' + b = (w . y + b) - sum over ablated l of a_l <w, d_l>

n tokens, F latents.
"""

from collections.abc import Iterator

import numpy as np
import torch

from shared.text.documents import Ints
from stage_eval.supervised.codes import Codes, Doubles, largest
from stage_eval.supervised.logistic import Probe

ABLATED = (2, 5, 10, 20, 50, 100, 500)
DRAWS = 5
"""Sets of random latents that a control is the mean of."""


def counts(num_latents: int) -> list[int]:
    """Numbers of latents that are ablated."""
    return [count for count in ABLATED if count <= num_latents]


def along(probe: Probe, row_FD: torch.Tensor) -> Doubles:
    """What one unit of each latent adds to a probe's logit, [F]."""
    found: Doubles = (row_FD @ probe.weight_D).numpy()
    return found


def ablated(logit_n: Doubles, codes: Codes, rows_n: Ints, along_F: Doubles, latents: list[int]) -> Doubles:
    """The logits [n] without these latents."""
    only_F = np.zeros_like(along_F)
    only_F[latents] = along_F[latents]
    return logit_n - codes.projected(only_F, rows_n)


def chosen(effect_F: Doubles, count: int) -> list[int]:
    """The latents of the largest effects, none without an effect."""
    return [latent for latent in largest(effect_F, count) if effect_F[latent] > 0]


def at_random(codes: Codes, rows_n: Ints, count: int, seed: int) -> Iterator[list[int]]:
    """`DRAWS` sets of as many latents among those that fire on these tokens, all of them where they are fewer."""
    alive = np.unique(codes.index_NK[rows_n][codes.value_NK[rows_n] > 0])
    rng = np.random.default_rng([seed, count])
    for _ in range(DRAWS):
        yield rng.choice(alive, min(count, len(alive)), replace=False).tolist()
