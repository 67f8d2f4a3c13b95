"""Labels that a rule can name: what kind of token, in which surroundings, at which position, in which part of Python.

A token has a label of the surroundings, or of Python, where it shares a character with a span of it; J labels.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.latents.vocabulary import Vocabulary
from shared.text import python
from shared.text.documents import Document, Marks, is_special, touched
from stage_inspect.scan.pairs import Ints

# Of the token's own text, and of those of its neighbours: what the whole of it must be.
CLASSES = {
    "small letters": r" ?[a-z]+",
    "a capital and small letters": r" ?[A-Z][a-z]+",
    "capital letters": r" ?[A-Z]{2,}",
    "one letter": r" ?[^\W\d_]",
    "digits": r" ?\d+",
    "signs": r" ?[^\w\s]+",
    "white space": r"\s+",
    "a line break, with or without more": r"(?s).*\n.*",
    "a space and more": r"(?s) .+",
    "with an underscore": r"(?s).*_.*",
    "an opening bracket": r".*[(\[{]",
    "a closing bracket": r"\s*[)\]}].*",
    "a quotation mark": r".*[\"'`\u201c\u201d\u2018\u2019].*",
    "the end of a sentence": r".*[.!?][\"')]*",
    "with letters beyond ASCII": r"(?s).*[^\x00-\x7f].*",
}
# Of the document's text.
SURROUNDINGS = {
    "first of a line": r"^[^\S\n]*\S",
    "last of a line": r"\S[^\S\n]*$",
    "indentation": r"^[^\S\n]+",
    "start of a word": r"\b\w",
    "first word of a sentence": r"(?:(?<=[.!?] )|(?<=[.!?][\"'] )|(?<=[.!?]\n))\w+",
    "after a blank line": r"(?<=\n\n)[^\S\n]*\S",
    "first line of the document": r"\A[^\n]*",
    "line of few words": r"^[^\S\n]*\S+(?:[^\S\n]\S+)?[^\S\n]*$",
    "in parentheses": r"\([^()\n]*\)",
    "in square brackets": r"\[[^\[\]\n]*\]",
    "in braces": r"\{[^{}\n]*\}",
    "in double quotes": r"\"[^\"\n]*\"",
    "in single quotes": r"(?<!\w)'[^'\n]*'(?!\w)",
    "in a word of capitals": r"\b[A-Z][A-Z0-9_]+\b",
    "in a CamelCase word": r"\b[A-Z][a-z0-9]+(?:[A-Z][a-z0-9]*)+\b",
    "in a snake_case name": r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b",
    "in a __dunder__ name": r"\b__\w+__\b",
    "in a word after a dot": r"(?<=\.)\w+",
    "in a name before a parenthesis": r"\w+(?=\()",
    "in a number": r"\b\d[\d_.xXa-fA-F]*\b",
    "in a URL": r"\bhttps?://\S+",
    "after = in a line": r"(?<==)[^=\n][^\n]*",
    "after a colon in a line": r"(?<=:)[^\n]+",
    "in a line that begins with #": r"^[^\S\n]*#[^\n]*",
    "in a line that begins with -, * or .": r"^[^\S\n]*[-*.][^\n]*",
    **{
        f"in a line that begins with {word}": rf"^[^\S\n]*{re.escape(word)}(?!\w)[^\n]*"
        for word in ("def", "class", "return", "if", "elif", "else", "for", "while", "with", "try", "except", "raise",
                     "import", "from", "assert", "self", "@", ">>>")
    },
}  # fmt: skip
POSITIONS = [1 << power for power in range(12)]


@dataclass(frozen=True)
class Label:
    """One of them."""

    name: str
    """In the record of a rule, for example ``python docstring``."""
    said: str
    """In its text."""


class Labels:
    """Every label of a corpus, in the order of the columns that `mark` gives."""

    def __init__(self, vocabulary: Vocabulary, *, with_python: bool) -> None:
        self.vocabulary = vocabulary
        self._surroundings = [re.compile(pattern, re.MULTILINE) for pattern in SURROUNDINGS.values()]
        self._python = list(python.CONCEPTS) if with_python else []
        self._classes = classes(vocabulary)
        self.all = [
            *(Label(f"token {name}", f"token is {name}") for name in CLASSES),
            *(Label(f"previous {name}", f"after {name}") for name in CLASSES),
            *(Label(f"next {name}", f"before {name}") for name in CLASSES),
            *(Label(f"text {name}", name) for name in SURROUNDINGS),
            Label("text inside of a word", "inside of a word"),
            *(Label(f"python {name}", f"Python {name}") for name in self._python),
            *(Label(f"position below {end}", f"among the first {end} tokens" if end > 1 else "first token")
              for end in POSITIONS),
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self.all)

    def of_document(self, document: Document) -> Marks:
        """[labels of the text and of Python, tokens]."""
        text = document.text
        rows = [touched(document, [one.span() for one in pattern.finditer(text)]) for pattern in self._surroundings]
        is_word = np.array([letter.isalnum() or letter == "_" for letter in text] + [False], bool)
        start = document.starts[:-1]
        rows.append(is_word[start] & (start > 0) & is_word[np.maximum(start - 1, 0)])
        spans = python.spans(text) if self._python else {}
        return np.array(rows + [touched(document, spans[name]) for name in self._python])

    def of_tokens(self, token: Ints, previous: Ints, following: Ints) -> Marks:
        """[labels of classes, tokens]; a neighbour that is not there, -1, is of no class."""
        return np.concatenate([self._classes[:, one] for one in (token, previous, following)])

    def of_positions(self, number: Ints) -> Marks:
        """[labels of positions, tokens], of positions as the model numbers them."""
        return number < np.array(POSITIONS)[:, None]

    @property
    def of_text(self) -> int:
        """How many `of_document` gives."""
        return len(self._surroundings) + 1 + len(self._python)


def classes(vocabulary: Vocabulary) -> Marks:
    """[classes, V + 1]: which tokens of the vocabulary are of a class; the last, index -1, is of none."""
    found = np.zeros((len(CLASSES), len(vocabulary) + 1), bool)
    for row, pattern in zip(found, map(re.compile, CLASSES.values()), strict=True):
        for token, text in enumerate(vocabulary.texts):
            row[token] = not is_special(vocabulary, token) and pattern.fullmatch(text) is not None
    return found


def affixes(vocabulary: Vocabulary, used: npt.NDArray[np.integer]) -> dict[tuple[str, str], list[int]]:
    """Tokens of the vocabulary by (where, letters), one to three letters that at least four used tokens share."""
    found: dict[tuple[str, str], list[int]] = {}
    texts = [text.strip() if not vocabulary.special[token] else "" for token, text in enumerate(vocabulary.texts)]
    for token, text in enumerate(texts):
        for length in range(1, 4):
            if len(text) >= length:
                found.setdefault(("begins", text[:length]), []).append(token)
                found.setdefault(("ends", text[-length:]), []).append(token)
    is_used = np.zeros(len(vocabulary), bool)
    is_used[used] = True
    return {key: tokens for key, tokens in found.items() if is_used[tokens].sum() >= 4}
