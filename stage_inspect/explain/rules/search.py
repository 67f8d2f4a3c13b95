"""The rule of best F1 for a latent, on the half of the documents that rules are found on.

F1 = 2 TP / (said + fired): TP tokens on which the rule holds and the latent fires, `said` on which the rule holds,
`fired` on which the latent does. The best set of at most K tokens is exact: F1 >= r where the sum of its tokens' gains
2 TP - r said is at least r fired, so the K largest gains are the best set at the r that they reach (Dinkelbach 1967).

The search starts from the best set of each channel, the best labels, the best affix and "any token", adds the condition
that helps most, and fits the sets again under what was added. A condition stays where it adds `MARGIN` to F1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.vocabulary import Vocabulary
from stage_inspect.explain.rules.corpus import Half
from stage_inspect.explain.rules.grammar import (
    CHANNELS,
    MOST,
    MOST_TOKENS,
    Affix,
    Channel,
    Condition,
    Labelled,
    OneOf,
    Rule,
    members,
)
from stage_inspect.explain.rules.labels import Labels, affixes
from stage_inspect.scan.pairs import Ints

MARGIN = 0.01  # of F1, that a further condition must add
STARTS = 3  # rules of one condition that are extended
FEWEST = 10  # firing tokens, below which there is nothing to find


@dataclass(frozen=True)
class Found:
    """A rule and its F1 on the half that it was found on."""

    rule: Rule
    f1: float


def best_set(right: Ints, said: Ints, fired: int, most: int = MOST_TOKENS) -> tuple[Ints, float]:
    """(values, F1) of the best set of at most `most` values, of which each holds on `said` tokens, rightly on `right`.

    The most telling first; the smaller value at a tie.
    """
    some = np.flatnonzero(right)
    chosen, ratio = some[:0], 0.0
    while True:
        gain = 2 * right[some] - ratio * said[some]
        order = np.lexsort((some, -gain))[:most]
        candidate = some[order[gain[order] > 0]]
        reached = 2 * int(right[candidate].sum()) / max(1, int(said[candidate].sum()) + fired)
        if reached <= ratio:
            return chosen, ratio
        chosen, ratio = candidate, reached


class Search:
    """Finds rules on one half; one latent at a time."""

    def __init__(self, half: Half, labels: Labels, vocabulary: Vocabulary) -> None:
        self.half, self.labels, self.size = half, labels, len(vocabulary)
        self._fires = np.zeros(half.num_tokens, bool)
        # Index -1, no neighbour, is counted in a last place that no set can name.
        self._ids: dict[Channel, Ints] = {
            name: np.where((ids < 0) | (ids >= self.size), self.size, ids) for name, ids in half.channels.items()
        }
        self._order = {name: np.argsort(ids, kind="stable") for name, ids in self._ids.items()}
        self._totals = {name: np.bincount(ids, minlength=self.size + 1) for name, ids in self._ids.items()}
        self._starts = {name: np.append(0, np.cumsum(total)) for name, total in self._totals.items()}
        self._of_label = half.labels_NJ.sum(0, dtype=np.int64)
        used = np.flatnonzero(self._totals["token"][:-1])
        self._affixes = list(affixes(vocabulary, used).items())
        self._affix = np.repeat(np.arange(len(self._affixes)), [len(ids) for _, ids in self._affixes])
        self._affix_token = np.array([token for _, ids in self._affixes for token in ids], np.int64)
        self._affix_said = self._per_affix(self._totals["token"])

    def find(self, latent: int) -> Found | None:
        """The best rule of a latent; None for one that fires on fewer than `FEWEST` tokens."""
        at, _ = self.half.firing(latent)
        if len(at) < FEWEST:
            return None
        self._fires[at] = True
        try:
            starts = sorted(self._singles(at), key=lambda found: -found.f1)
            found = [self._extended(start, at) for start in starts[:STARTS]]
        finally:
            self._fires[at] = False
        return max([*found, *starts], key=lambda one: (round(one.f1, 9), -len(one.rule.conditions)))

    def _singles(self, at: Ints) -> list[Found]:
        """Rules of no or one condition."""
        fired = len(at)
        found = [Found(Rule(), 2 * fired / (self.half.num_tokens + fired))]
        for channel in CHANNELS:
            found += self._set(channel, np.bincount(self._ids[channel][at], minlength=self.size + 1),
                               self._totals[channel], fired)  # fmt: skip
        right = self.half.labels_NJ[at].sum(0, dtype=np.int64)
        f1 = 2 * right / np.maximum(1, self._of_label + fired)
        found += [
            Found(Rule((self._label(number),)), float(f1[number])) for number in np.argsort(-f1, kind="stable")[:2]
        ]
        if self._affixes:
            right = self._per_affix(np.bincount(self._ids["token"][at], minlength=self.size + 1))
            f1 = 2 * right / np.maximum(1, self._affix_said + fired)
            best = int(f1.argmax())
            (where, letters), ids = self._affixes[best]
            found.append(Found(Rule((Affix(letters, where, tuple(ids)),)), float(f1[best])))  # type: ignore[arg-type]
        return found

    def _extended(self, found: Found, at: Ints) -> Found:
        """With further conditions, as long as they help."""
        while found.rule.conditions and len(found.rule.conditions) < MOST:
            better = self._refitted(self._longer(found.rule, at), at)
            if better.f1 < found.f1 + MARGIN:
                break
            found = better
        return found

    def _longer(self, rule: Rule, at: Ints) -> Found:
        """The rule with the one more condition that gives the best F1."""
        fired = len(at)
        said = self._said(rule)
        hits = said[self._fires[said]]
        candidates = [Found(rule, 0.0)]
        for channel in CHANNELS:
            if not rule.has(channel):
                candidates += self._set(channel, *self._counts(channel, hits, said), fired, rule.conditions)
        right = self.half.labels_NJ[hits].sum(0, dtype=np.int64)
        all_ = self.half.labels_NJ[said].sum(0, dtype=np.int64)
        for is_true, rights, saids in ((True, right, all_), (False, len(hits) - right, len(said) - all_)):
            f1 = 2 * rights / np.maximum(1, saids + fired)
            f1[[one.label for one in rule.conditions if isinstance(one, Labelled)]] = 0
            best = int(f1.argmax())
            candidates.append(Found(Rule((*rule.conditions, self._label(best, is_true))), float(f1[best])))
        return max(candidates, key=lambda one: one.f1)

    def _refitted(self, found: Found, at: Ints) -> Found:
        """The same conditions with each set of tokens the best under the others."""
        for one in found.rule.conditions:
            if not isinstance(one, OneOf):
                continue
            others = tuple(other for other in found.rule.conditions if other.subject != one.subject)
            said = self._said(Rule(others))
            hits = said[self._fires[said]]
            again = self._set(one.channel, *self._counts(one.channel, hits, said), len(at), others)
            found = max([found, *again], key=lambda one: one.f1)
        return found

    def _counts(self, channel: Channel, hits: Ints, said: Ints) -> tuple[Ints, Ints]:
        """Of each id of a channel, the tokens among `hits` and `said`."""
        ids = self._ids[channel]
        return np.bincount(ids[hits], minlength=self.size + 1), np.bincount(ids[said], minlength=self.size + 1)

    def _set(
        self, channel: Channel, right: Ints, said: Ints, fired: int, others: tuple[Condition, ...] = ()
    ) -> list[Found]:
        """The best set of a channel's tokens beside other conditions; nothing where no token helps."""
        chosen, f1 = best_set(right[:-1], said[:-1], fired)
        return [Found(Rule((*others, OneOf(channel, tuple(chosen.tolist())))), f1)] if len(chosen) else []

    def _said(self, rule: Rule) -> Ints:
        """Tokens on which a rule holds, ascending; by the index of its smallest set of tokens where it has one."""
        sets = [one for one in rule.conditions if not isinstance(one, Labelled)]
        if sets:
            first = min(sets, key=lambda one: int(self._totals[one.channel][list(one.ids)].sum()))
            order, starts = self._order[first.channel], self._starts[first.channel]
            said = np.sort(np.concatenate([order[starts[token] : starts[token + 1]] for token in first.ids]))
        else:
            first, said = None, np.arange(self.half.num_tokens)
        for one in rule.conditions:
            if isinstance(one, Labelled):
                said = said[self.half.labels_NJ[said, one.label].astype(bool) == one.is_true]
            elif one is not first:
                said = said[members(one.ids, self.size)[self._ids[one.channel][said]]]
        return said

    def _per_affix(self, counts: Ints) -> npt.NDArray[np.float64]:
        """Sums over the tokens of each affix."""
        sums = np.bincount(self._affix, weights=counts[self._affix_token], minlength=len(self._affixes))
        return sums.astype(np.float64)

    def _label(self, number: int, is_true: bool = True) -> Labelled:
        label = self.labels.all[number]
        return Labelled(int(number), label.name, label.said, is_true)
