"""Where the linear map of a skip transcoder starts.

Shape letters: M tokens of a sample, D width of what is read, E of what is written.
"""

from collections.abc import Callable

from torch import Tensor, linalg

from shared.sae.learn.config import SkipLearningConfig
from shared.sae.variants.one_group import OneGroup
from shared.sae.variants.skip_transcoder import SkipTranscoder

# Penalties of the regression, from none to speak of to a hundred times what is read.
RIDGES = [10.0**power for power in range(-8, 3)]


def start_skip(dictionary: OneGroup, learning: SkipLearningConfig, normal_MD: Tensor, target_MD: Tensor) -> None:
    """The skip at zero, or at the regression of what is wanted on what is read, whose intercept b_dec takes."""
    assert isinstance(dictionary, SkipTranscoder)
    if learning.skip_init == "zero":
        dictionary.W_skip.zero_()
        return
    mean_D = normal_MD.mean(0)
    dictionary.W_skip.copy_(ridge(normal_MD - mean_D, target_MD - dictionary.b_dec).T)
    dictionary.b_dec.sub_(dictionary.W_skip @ mean_D)


def ridge(x_MD: Tensor, y_ME: Tensor) -> Tensor:
    """The map W [D, E] that minimises ``sum |y - x W|^2 + r |W|^2``, in float64.

    r is that of RIDGES, times the mean square of x, which does best on the second half of the rows when fitted to the
    first: with few rows for the width of x the unpenalised map would fit their noise.
    """
    x_MD, y_ME = x_MD.double(), y_ME.double()
    half = len(x_MD) // 2
    scale = float(x_MD.square().sum()) / x_MD.shape[1]

    def fit(rows: slice) -> Callable[[float], Tensor]:
        values_D, vectors_DD = linalg.eigh(x_MD[rows].T @ x_MD[rows])
        turned_DE = vectors_DD.T @ (x_MD[rows].T @ y_ME[rows])
        return lambda r: vectors_DD @ (turned_DE / (values_D.clamp_min(0) + r * scale)[:, None])

    of_half = fit(slice(half))
    best = min(RIDGES, key=lambda r: float((y_ME[half:] - x_MD[half:] @ of_half(r)).square().sum()))
    return fit(slice(None))(best)
