"""What several formats want and a latents folder does not hold in their form: linear histograms, intervals, texts."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.basics.errors import GranaryError
from shared.latents.examples import Example
from shared.latents.folder import Latents
from shared.latents.vocabulary import Vocabulary

Doubles = npt.NDArray[np.float64]
BARS = 50  # of a linear histogram
INTERVALS = 5  # of the range from 0 to the largest activation


@dataclass(frozen=True)
class Interval:
    """Examples whose peak lies in (low, high], and the share of all firing tokens there."""

    low: float
    high: float
    share: float
    examples: list[Example]


def chosen_latents(text: str | None, latents: Latents) -> list[int]:
    """``0:128``, ``3,7,9`` or all; raises GranaryError for one that is not there."""
    F = latents.num_latents
    try:
        if text is None:
            found = list(range(F))
        elif ":" in text:
            start, stop = text.split(":")
            found = list(range(F))[int(start or 0) : int(stop or F)]
        else:
            found = [int(part) for part in text.split(",")]
    except ValueError:
        raise GranaryError(f"--latents {text}: write 0:128 or 3,7,9") from None
    if not found or not all(0 <= latent < F for latent in found):
        raise GranaryError(f"--latents {text}: choose from 0 to {F - 1}")
    return found


def words(latents: Latents) -> Vocabulary:
    """The vocabulary; raises GranaryError for a folder without one, whose tokens have no text."""
    if latents.vocabulary is None:
        raise GranaryError(f"{latents.url} has no vocabulary: inspect again where the model's tokenizer is")
    return latents.vocabulary


def shown(vocabulary: Vocabulary, tokens: npt.NDArray[np.integer] | list[int]) -> list[str]:
    """One text per token, never empty: parts of a character as ``<0xE2>``, a token without bytes by its number."""
    return [vocabulary.text_of(token) or f"<token {token}>" for token in map(int, tokens)]


def spread(histogram: npt.NDArray[np.uint64], edges: Doubles, cuts: Doubles) -> Doubles:
    """Counts between linear `cuts` from counts in bins of the logarithm, each spread evenly over its own width."""
    low, high = np.maximum(edges[:-1], cuts[0]), np.minimum(edges[1:], cuts[-1])
    width = np.maximum(high - low, 0)
    below = np.clip(cuts[:, None] - low, 0, width)
    # A bin that is a point, or lies outside by rounding, counts where it begins.
    share = np.where(width > 0, below / np.where(width > 0, width, 1), cuts[:, None] > low)
    share[-1] = 1
    return np.diff((share * histogram.astype(np.float64)).sum(1))


def linear_histogram(latents: Latents, index: int) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Centres and counts of `BARS` equal bars from 0 to the largest activation; nothing for a dead latent."""
    largest = float(latents.table["max"][index])
    if not latents.table["fired"][index] or largest <= 0:
        return np.empty(0), np.empty(0, np.int64)
    cuts = np.linspace(0, largest, BARS + 1)
    counts = spread(latents.array("histogram").row(index), latents.histogram_edges, cuts)
    whole = np.diff(np.round(np.cumsum(counts)), prepend=0)
    return (cuts[1:] + cuts[:-1]) / 2, whole.astype(np.int64)


def intervals(latents: Latents, index: int, count: int) -> list[Interval]:
    """The range of the activation in equal parts, the highest first, with `count` sampled examples of each."""
    largest = float(latents.table["max"][index])
    fired = int(latents.table["fired"][index])
    if not fired or largest <= 0:
        return []
    cuts = np.linspace(0, largest, INTERVALS + 1)
    shares = spread(latents.array("histogram").row(index), latents.histogram_edges, cuts) / fired
    sample = latents.sample(index)
    found = []
    for low, high, share in reversed(list(zip(cuts[:-1], cuts[1:], shares, strict=True))):
        inside = [one for one in sample if low < one.value <= high]
        found.append(Interval(float(low), float(high), float(share), inside[:count]))
    return found
