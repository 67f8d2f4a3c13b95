"""How well each latent tells a concept's tokens from the others, from histograms of its activation on both.

F latents, B bins of the activation (see `shared.latents.layout`), C concepts, S scopes (sets of tokens in which
concepts are looked for), M latents chosen for a concept, U units (documents, or several of them together), R resamples.
A latent says "yes" to a token where its activation reaches the lower edge of a bin. F1 = 2 TP / (2 TP + FP + FN); AUROC
is the chance that an example's activation is above another token's, ties by half (bins and silence are ties).

Latents and their edges are chosen on one half of the documents (`Tally`, `choose`) and scored on the other (`Detail`,
`score`): the best of many on the same tokens would flatter. Intervals are those of the bootstrap over units (Efron
1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.layout import BINS

Counts = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]

RESAMPLES = 1000
INTERVAL = (0.025, 0.975)


@dataclass
class Tally:
    """Counts of the choosing half's tokens, added batch by batch."""

    yes_CFB: npt.NDArray[np.uint32]
    """Firing tokens that are examples."""
    all_SFB: npt.NDArray[np.uint32]
    """Firing tokens of the scope."""
    yes_C: Counts
    """Examples."""

    @classmethod
    def empty(cls, concepts: int, scopes: int, latents: int) -> "Tally":
        """Make the tally before the first batch."""
        return cls(
            np.zeros((concepts, latents, BINS), np.uint32),
            np.zeros((scopes, latents, BINS), np.uint32),
            np.zeros(concepts, np.int64),
        )

    def add(self, latent: Counts, bin_: Counts, marks_CP: Marks, inside_SP: Marks) -> None:
        """Firing tokens [P]: latent and bin of each, of which concepts it is an example, and which scopes hold it."""
        cell = latent * BINS + bin_
        for counts, chosen in ((self.yes_CFB, marks_CP), (self.all_SFB, inside_SP)):
            for row, is_chosen in zip(counts, chosen, strict=True):
                np.add.at(row.reshape(-1), cell[is_chosen], np.uint32(1))


@dataclass(frozen=True, slots=True)
class Chosen:
    """A latent with the bin from which on it says yes."""

    latent: int
    edge: int
    f1: float
    """On the half on which both were chosen."""


def choose(tally: Tally, concept: int, scope: int, count: int) -> list[Chosen]:
    """The `count` latents of the highest F1 at their best edge, best first; the smaller number at a tie."""
    examples = int(tally.yes_C[concept])
    f1_FB = f1(from_above(tally.yes_CFB[concept]), from_above(tally.all_SFB[scope]), examples)
    edge_F = f1_FB.argmax(1)
    best_F = f1_FB[np.arange(len(f1_FB)), edge_F]
    chosen = np.lexsort((np.arange(len(best_F)), -best_F))[:count]
    return [Chosen(latent, int(edge_F[latent]), float(best_F[latent])) for latent in chosen.tolist()]


class Detail:
    """Counts of the scoring half's tokens, of the chosen latents alone, by unit."""

    def __init__(self, chosen: Sequence[Sequence[Chosen]], scopes: Sequence[int], units: int, latents: int) -> None:
        """`chosen`: those of each concept; `scopes`: the scope of each."""
        self.chosen, self.scopes = chosen, scopes
        self._slot_CF = np.full((len(chosen), latents), -1, np.int32)
        for slots, ones in zip(self._slot_CF, chosen, strict=True):
            slots[[one.latent for one in ones]] = np.arange(len(ones))
        widest = max(map(len, chosen), default=0)
        self.yes_CUMB = np.zeros((len(chosen), units, widest, BINS), np.uint32)
        self.all_CUMB = np.zeros_like(self.yes_CUMB)
        self.examples_CU = np.zeros((len(chosen), units), np.int64)
        self.tokens_CU = np.zeros((len(chosen), units), np.int64)

    def add(self, latent: Counts, bin_: Counts, unit: Counts, marks_CP: Marks, inside_SP: Marks) -> None:
        """Firing tokens, as in `Tally.add`, and the unit of each."""
        for concept, scope in enumerate(self.scopes):
            slot = self._slot_CF[concept, latent]
            counted = (slot >= 0) & inside_SP[scope]
            cell = (unit * self.yes_CUMB.shape[2] + slot) * BINS + bin_
            np.add.at(self.all_CUMB[concept].reshape(-1), cell[counted], np.uint32(1))
            np.add.at(self.yes_CUMB[concept].reshape(-1), cell[counted & marks_CP[concept]], np.uint32(1))

    def add_tokens(self, unit: Counts, marks_CN: Marks, inside_SN: Marks) -> None:
        """All tokens [N], silent ones too."""
        units = self.tokens_CU.shape[1]
        for concept, scope in enumerate(self.scopes):
            self.tokens_CU[concept] += np.bincount(unit[inside_SN[scope]], minlength=units)
            self.examples_CU[concept] += np.bincount(unit[marks_CN[concept] & inside_SN[scope]], minlength=units)


@dataclass(frozen=True, slots=True)
class Match:
    """A latent as a detector of a concept; all on documents that had no part in choosing it, but `chosen_f1`."""

    latent: int
    f1: float
    low: float
    """Ends of the 95 % interval of F1; both F1 itself where there is one unit alone."""
    high: float
    precision: float
    recall: float
    auroc: float
    auroc_low: float
    auroc_high: float
    threshold_bin: int
    """It says yes from this bin of the histogram on."""
    chosen_f1: float
    """F1 on the half on which latent and threshold were chosen."""


def score(detail: Detail, concept: int, seed: int = 0) -> list[Match]:
    """The chosen latents of a concept on the scoring half, in the order in which they were chosen."""
    used = detail.tokens_CU[concept] > 0
    yes_UMB, all_UMB = (counts[concept][used].astype(np.float64) for counts in (detail.yes_CUMB, detail.all_CUMB))
    examples_U, tokens_U = (
        counts[concept][used].astype(np.float64) for counts in (detail.examples_CU, detail.tokens_CU)
    )
    U = len(tokens_U)
    often_RU = np.random.default_rng(seed).multinomial(U, np.full(U, 1 / max(U, 1)), RESAMPLES).astype(np.float64)
    weights_RU = np.concatenate([np.ones((1, U)), often_RU])  # the first row: as it is
    examples_R, tokens_R = weights_RU @ examples_U, weights_RU @ tokens_U
    found = []
    for slot, one in enumerate(detail.chosen[concept]):
        yes_RB, all_RB = weights_RU @ yes_UMB[:, slot], weights_RU @ all_UMB[:, slot]
        right_R, said_R = yes_RB[:, one.edge :].sum(1), all_RB[:, one.edge :].sum(1)
        f1_R, auroc_R = f1(right_R, said_R, examples_R), auroc(yes_RB, all_RB, examples_R, tokens_R)
        (low, high), (auroc_low, auroc_high) = interval(f1_R[1:]), interval(auroc_R[1:])
        found.append(
            Match(
                latent=one.latent,
                f1=float(f1_R[0]),
                low=low,
                high=high,
                precision=float(right_R[0] / max(said_R[0], 1)),
                recall=float(right_R[0] / max(examples_R[0], 1)),
                auroc=float(auroc_R[0]),
                auroc_low=auroc_low,
                auroc_high=auroc_high,
                threshold_bin=one.edge,
                chosen_f1=one.f1,
            )
        )
    return found


def from_above(counts_FB: npt.NDArray[np.unsignedinteger]) -> Counts:
    """Tokens in each bin or above."""
    found: Counts = counts_FB[..., ::-1].cumsum(-1, dtype=np.int64)[..., ::-1]
    return found


def f1(right: npt.NDArray[np.number], said: npt.NDArray[np.number], examples: npt.NDArray[np.number] | int) -> Doubles:
    """2 TP / (yes said + examples), 0 where both are none."""
    found: Doubles = 2 * right / np.maximum(said + examples, 1)
    return found


def auroc(yes_RB: Doubles, all_RB: Doubles, examples_R: Doubles, tokens_R: Doubles) -> Doubles:
    """Compute that of one latent, its silent tokens as the lowest value; 0.5 where there is nothing to tell apart."""
    positive = np.column_stack([examples_R - yes_RB.sum(1), yes_RB])
    negative = np.column_stack([tokens_R - all_RB.sum(1), all_RB]) - positive
    below = negative.cumsum(1) - negative
    pairs = positive.sum(1) * negative.sum(1)
    return np.where(pairs > 0, (positive * (below + negative / 2)).sum(1) / np.where(pairs > 0, pairs, 1), 0.5)


def interval(values_R: Doubles) -> tuple[float, float]:
    """Its ends, from resamples."""
    low, high = np.quantile(values_R, INTERVAL).tolist()
    return low, high
