"""Concepts as a user gives them, and the tokens that are examples of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.basics.errors import GranaryError
from shared.latents.vocabulary import Vocabulary
from shared.text import python
from shared.text.documents import Document, Marks, touched
from stage_inspect.concepts.marked import MarkedSpans


@dataclass(frozen=True)
class Concepts:
    """What is looked for: concepts of Python, regular expressions, sets of tokens, marked spans; each has a name."""

    python: tuple[str, ...] = ()
    regex: dict[str, re.Pattern[str]] = field(default_factory=dict)
    tokens: dict[str, frozenset[int]] = field(default_factory=dict)
    marked: MarkedSpans = field(default_factory=MarkedSpans)

    @property
    def names(self) -> list[str]:
        """The concepts' names, in the order of the rows that `mark` gives."""
        return [*self.python, *self.regex, *self.tokens, *map(marked_name, self.marked.labels)]

    @property
    def scopes(self) -> list[int]:
        """The scope that `mark` gives in which each concept is looked for: 0 all tokens, 1 marked text."""
        return [0] * (len(self.names) - len(self.marked.labels)) + [1] * len(self.marked.labels)

    @property
    def definitions(self) -> dict[str, str]:
        """How each was given."""
        return (
            {name: f"python: {python.CONCEPTS[name]}" for name in self.python}
            | {name: f"regex: {pattern.pattern}" for name, pattern in self.regex.items()}
            | {name: f"tokens: {sorted(ids)}" for name, ids in self.tokens.items()}
            | {marked_name(label): f"spans marked as {label}" for label in self.marked.labels}
        )

    def mark(self, document: Document) -> tuple[Marks, Marks]:
        """[concepts, tokens]: a token is an example where it shares a character with a span; [scopes, tokens]."""
        spans = python.spans(document.text) if self.python else {}
        rows = [touched(document, spans[name]) for name in self.python]
        matches = [[found.span() for found in pattern.finditer(document.text)] for pattern in self.regex.values()]
        rows += [touched(document, one) for one in matches]
        rows += [np.isin(document.tokens, sorted(ids)) for ids in self.tokens.values()]
        inside = [np.ones(len(document.places), bool)]
        if self.marked.labels:
            by_label, seen = self.marked.of(document)
            rows += [touched(document, by_label[label]) for label in self.marked.labels]
            inside.append(touched(document, seen))
        return np.array(rows).reshape(len(self.names), len(document.places)), np.array(inside)


def marked_name(label: str) -> str:
    """The name of the concept of a label."""
    return f"marked {label}"


def parse(
    names: Sequence[str],
    regexes: Sequence[str],
    tokens: Sequence[str],
    vocabulary: Vocabulary,
    marked: Path | None = None,
) -> Concepts:
    """Concepts from a command line; raises GranaryError for a name, expression, token or span that there is not."""
    chosen = list(python.CONCEPTS) if "all" in names else list(names)
    for name in chosen:
        if name not in python.CONCEPTS:
            raise GranaryError(f"{name!r} is no concept of Python here: choose from all, {', '.join(python.CONCEPTS)}")
    patterns = {}
    for text in regexes:
        try:
            patterns[f"/{text}/"] = re.compile(text, re.MULTILINE)
        except (re.error, OverflowError, RecursionError) as error:
            raise GranaryError(f"{text!r} is no regular expression: {error}") from None
    sets = {}
    for text in tokens:
        ids = vocabulary.find(text)
        if not ids:
            raise GranaryError(f"{text!r} is no token of the vocabulary: give --regex for a text of several tokens")
        sets[f"token {text}"] = frozenset(ids)
    concepts = Concepts(tuple(chosen), patterns, sets, MarkedSpans.read(marked) if marked else MarkedSpans())
    if not concepts.names:
        raise GranaryError("say what to look for: --python all, --regex 'self', --token def, --spans FILE")
    return concepts
