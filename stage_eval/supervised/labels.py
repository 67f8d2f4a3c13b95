"""Labels of tokens as bits of one number, and the tasks that they make. P tokens of a document.

Three kinds of task, each of which draws tokens of its own:

- a concept: its examples against all other tokens (sparse probing, splitting, absorption);
- kinds: classes of which a token is in one at most (targeted probe perturbation);
- a pair: two labels within a population, in all four combinations (spurious correlation removal).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.latents.vocabulary import Vocabulary
from shared.text import python
from shared.text.documents import Document, Ints, Marks, is_special, touched

CONCEPTS = dict(python.CONCEPTS)
DERIVED = {
    "other string": "string literals that are no docstring",
    "prose": "comments and docstrings",
    "capital": "tokens whose first letter is a capital",
    "letters": "tokens with a letter",
    "name": "names in code, keywords and constants left out",
}
BITS = {name: number for number, name in enumerate([*CONCEPTS, *DERIVED])}
"""Which bit of a token's number says that it has a label."""
KINDS = ("comment", "docstring", "other string", "number", "keyword", "operator", "attribute", "indentation")


@dataclass(frozen=True)
class Pair:
    """Two labels that occur with and without one another in a population."""

    first: str
    second: str
    among: tuple[str, ...]
    """A token of the population has all of these labels."""

    @property
    def name(self) -> str:
        """``attribute and call``."""
        return f"{self.first} and {self.second}"


PAIRS = (
    Pair("attribute", "call", ("name",)),
    Pair("docstring", "capital", ("prose", "letters")),
    Pair("prose", "capital", ("letters",)),
)


class Labeller:
    """Labels the tokens of documents."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        letters = [
            "" if is_special(vocabulary, token) else "".join(filter(str.isalpha, text))
            for token, text in enumerate(vocabulary.texts)
        ]
        self._has_letter_V = np.array([bool(one) for one in letters] + [False])
        self._is_capital_V = np.array([one[:1].isupper() for one in letters] + [False])

    def bits(self, document: Document) -> Ints:
        """Every token's labels, [P]."""
        spans = python.spans(document.text)
        marks: dict[str, Marks] = {name: touched(document, spans[name]) for name in CONCEPTS}
        known = np.where(document.tokens < len(self._has_letter_V), document.tokens, -1)
        marks["letters"], marks["capital"] = self._has_letter_V[known], self._is_capital_V[known]
        marks["other string"] = marks["string"] & ~marks["docstring"]
        marks["prose"] = marks["comment"] | marks["docstring"]
        no_name = ("string", "comment", "keyword", "constant", "number")
        marks["name"] = marks["letters"] & ~np.any([marks[one] for one in no_name], axis=0)
        return sum((marks[name].astype(np.int64) << bit for name, bit in BITS.items()), np.zeros(len(known), np.int64))


def has(bits_N: Ints, name: str) -> Marks:
    """Which tokens have a label."""
    return (bits_N >> BITS[name] & 1).astype(bool)


def strata(bits_N: Ints) -> dict[str, Mapping[str, Marks]]:
    """Tasks by their name, each with the groups of tokens that it draws from; no token is in two groups of a task."""
    found: dict[str, Mapping[str, Marks]] = {}
    for name in CONCEPTS:
        mark = has(bits_N, name)
        found[f"concept {name}"] = {"yes": mark, "no": ~mark}
    of_kind = {kind: has(bits_N, kind) for kind in KINDS}
    alone = sum(of_kind.values(), np.zeros(len(bits_N), np.int64)) == 1
    found["kinds"] = {kind: mark & alone for kind, mark in of_kind.items()}
    for pair in PAIRS:
        among = np.all([has(bits_N, one) for one in pair.among], axis=0)
        first, second = has(bits_N, pair.first), has(bits_N, pair.second)
        found[f"pair {pair.name}"] = {
            "both": among & first & second,
            "first": among & first & ~second,
            "second": among & ~first & second,
            "neither": among & ~first & ~second,
        }
    return found
