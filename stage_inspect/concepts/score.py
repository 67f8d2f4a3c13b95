"""How well each latent tells a concept's tokens from the others, from histograms of its activation on both.

F latents, B bins of the activation (see `shared.latents.layout`), C concepts, G groups of documents. A latent says
"yes" to a token where its activation reaches the lower edge of a bin. F1 = 2 TP / (2 TP + FP + FN) at the best edge;
AUROC is the chance that an example's activation is above another token's, ties by half (bins and silence are ties).
Intervals are those of the jackknife over groups of documents (Efron and Stein 1981), the edge held fixed.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.layout import BINS

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass
class Tally:
    """Counts of tokens, added batch by batch."""

    yes_CGFB: npt.NDArray[np.uint32]
    """Firing tokens that are examples."""
    all_GFB: npt.NDArray[np.uint32]
    """Firing tokens."""
    yes_CG: Counts
    """Examples."""
    all_G: Counts
    """Tokens."""

    @classmethod
    def empty(cls, concepts: int, groups: int, latents: int) -> "Tally":
        """Before the first batch."""
        shape = (groups, latents, BINS)
        return cls(
            np.zeros((concepts, *shape), np.uint32),
            np.zeros(shape, np.uint32),
            np.zeros((concepts, groups), np.int64),
            np.zeros(groups, np.int64),
        )

    def add(self, latent: Counts, bin_: Counts, group: Counts, marks: npt.NDArray[np.bool_]) -> None:
        """Firing tokens: latent, bin and group of documents of each, and [C, pairs] whether it is an example."""
        _, F, B = self.all_GFB.shape
        cell = (group * F + latent) * B + bin_
        np.add.at(self.all_GFB.reshape(-1), cell, np.uint32(1))
        for concept, is_example in enumerate(marks):
            np.add.at(self.yes_CGFB[concept].reshape(-1), cell[is_example], np.uint32(1))


@dataclass(frozen=True, slots=True)
class Match:
    """A latent as a detector of a concept."""

    latent: int
    f1: float
    low: float
    """Ends of the 95 % interval of F1; both F1 itself where there is one group of documents alone."""
    high: float
    precision: float
    recall: float
    auroc: float
    threshold_bin: int
    """It says yes from this bin of the histogram on."""


def rank(tally: Tally, concept: int, count: int) -> list[Match]:
    """The `count` latents of the highest F1, best first; the smaller number at a tie."""
    yes_GFB = tally.yes_CGFB[concept]
    yes_FB, all_FB = yes_GFB.sum(0, dtype=np.int64), tally.all_GFB.sum(0, dtype=np.int64)
    examples, tokens = int(tally.yes_CG[concept].sum()), int(tally.all_G.sum())
    f1_FB = f1(from_above(yes_FB), from_above(all_FB), examples)
    edge_F = f1_FB.argmax(1)
    best_F = f1_FB[np.arange(len(f1_FB)), edge_F]
    chosen = np.lexsort((np.arange(len(best_F)), -best_F))[:count]
    found = []
    for latent in chosen.tolist():
        edge = int(edge_F[latent])
        right, said = int(yes_FB[latent, edge:].sum()), int(all_FB[latent, edge:].sum())
        low, high = interval(tally, concept, latent, edge)
        found.append(
            Match(
                latent=latent,
                f1=float(best_F[latent]),
                low=low,
                high=high,
                precision=right / max(said, 1),
                recall=right / max(examples, 1),
                auroc=auroc(yes_FB[latent], all_FB[latent], examples, tokens),
                threshold_bin=edge,
            )
        )
    return found


def from_above(counts_FB: Counts) -> Counts:
    """Tokens in each bin or above."""
    return counts_FB[..., ::-1].cumsum(-1)[..., ::-1]


def f1(right: Counts, said: Counts, examples: Counts | int) -> Doubles:
    """2 TP / (yes said + examples), 0 where both are none."""
    found: Doubles = 2 * right / np.maximum(said + examples, 1)
    return found


def auroc(yes_B: Counts, all_B: Counts, examples: int, tokens: int) -> float:
    """Of one latent, with its silent tokens as the lowest value; 0.5 where there is nothing to tell apart."""
    positive = np.append(examples - yes_B.sum(), yes_B).astype(float)
    negative = np.append(tokens - all_B.sum(), all_B) - positive
    below = np.cumsum(negative) - negative
    pairs = positive.sum() * negative.sum()
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else 0.5


def interval(tally: Tally, concept: int, latent: int, edge: int) -> tuple[float, float]:
    """F1 plus and minus 1.96 standard errors, from leaving out one group of documents at a time."""
    right_G = tally.yes_CGFB[concept][:, latent, edge:].sum(1, dtype=np.int64)
    said_G = tally.all_GFB[:, latent, edge:].sum(1, dtype=np.int64)
    examples_G = tally.yes_CG[concept]
    used = tally.all_G > 0
    whole = float(f1(right_G.sum(), said_G.sum(), examples_G.sum()))
    G = int(used.sum())
    if G < 2:
        return whole, whole
    without = f1(right_G.sum() - right_G[used], said_G.sum() - said_G[used], examples_G.sum() - examples_G[used])
    error = float(np.sqrt((G - 1) / G * np.square(without - without.mean()).sum()))
    return max(0.0, whole - 1.96 * error), min(1.0, whole + 1.96 * error)
