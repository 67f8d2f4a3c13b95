"""Concepts of Python source, with the truth from Python's own tokenizer: spans of characters by the concept's name.

And whether a text is Python at all, as Python's own parser says.
"""

import ast
import io
import keyword
import re
import token as kinds
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from itertools import accumulate

from shared.latents.vocabulary import Vocabulary
from shared.store import Store
from shared.text.documents import Ints, Span, documents

CONCEPTS = {
    "string": "string literals, docstrings too",
    "docstring": "strings that are a statement of their own",
    "comment": "comments",
    "number": "number literals",
    "self": "the name self",
    "keyword": "keywords",
    "constant": "True, False and None",
    "after def": "names after def",
    "after class": "names after class",
    "parameter": "names of parameters in a def",
    "decorator": "decorators, from @ on",
    "import": "names of modules that are imported",
    "attribute": "names after a dot",
    "call": "names before an opening parenthesis, defs left out",
    "operator": "operators and delimiters",
    "closing": "closing brackets",
    "indentation": "spaces at the start of a line, before code",
    "exception": "names that end in Error or Exception",
    "dunder": "names between two underscores on each side",
}
MOST_MARGINS = 16  # lines at the margin at which the rest of a text is cut off to see whether it is Python
SAMPLE = 32  # documents looked at to see whether the text is Python
ENDS = frozenset((tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING))


def spans(text: str) -> dict[str, list[Span]]:
    """Spans of every concept in a piece of Python; of text that is none, those up to where that shows."""
    lines = list(accumulate(map(len, text.splitlines(keepends=True)), initial=0))
    found: dict[str, list[Span]] = {name: [] for name in CONCEPTS}
    before = [tokenize.TokenInfo(tokenize.NEWLINE, "", (0, 0), (0, 0), "")] * 2
    state = _Statement()
    last = (0, 0)
    for one in _tokens(text):
        start, stop = lines[one.start[0] - 1] + one.start[1], lines[one.end[0] - 1] + one.end[1]
        for name in _concepts_of(one, before, state):
            found[name].append((start, stop))
        margin = text[start - one.start[1] : start]
        if margin and not margin.strip() and one.type not in ENDS and before[-1].type in ENDS:
            found["indentation"].append((start - len(margin), start))
        if one.string == "(" and is_called(before):
            found["call"].append(last)
        last = (start, stop)
        if one.type == tokenize.NEWLINE and state.could_be_docstring is not None:
            found["docstring"].append(state.could_be_docstring)
        state.step(one, (start, stop))
        before = [before[-1], one]
    return found


def is_called(before: list[tokenize.TokenInfo]) -> bool:
    """Whether the last token is a name that a parenthesis behind it calls."""
    name = before[-1]
    return (
        name.type == tokenize.NAME and not keyword.iskeyword(name.string) and before[-2].string not in ("def", "class")
    )


class _Statement:
    """What has to be remembered within a statement."""

    def __init__(self) -> None:
        self.depth = 0
        self.first = ""
        self.parameters: int | None = None  # depth of the parentheses of a def
        self.could_be_docstring: Span | None = None
        self._is_fresh = True

    def step(self, one: tokenize.TokenInfo, span: Span) -> None:
        """After a token."""
        if one.type == tokenize.NEWLINE:
            self.__init__()  # type: ignore[misc]
            return
        if one.type in ENDS:
            return
        is_string = one.type == tokenize.STRING
        self.could_be_docstring = span if self._is_fresh and is_string else None
        if self._is_fresh:
            self.first = one.string
        if one.string == "def":
            self.first = "def"
        self._is_fresh = False
        if one.type == tokenize.OP and one.string in "([{":
            self.depth += 1
            if self.first == "def" and self.depth == 1:
                self.parameters = 1
        if one.type == tokenize.OP and one.string in ")]}":
            self.depth -= 1
            if self.depth == 0:
                self.parameters = None


def _concepts_of(one: tokenize.TokenInfo, before: list[tokenize.TokenInfo], state: _Statement) -> Iterator[str]:
    """Concepts that a whole token is an example of."""
    kind, string, last = one.type, one.string, before[-1].string
    if kind == tokenize.STRING or kinds.tok_name[kind].startswith("FSTRING"):
        yield "string"
    elif kind == tokenize.COMMENT:
        yield "comment"
    elif kind == tokenize.NUMBER:
        yield "number"
    elif kind == tokenize.OP:
        yield "operator"
        if string in ")]}":
            yield "closing"
    elif kind == tokenize.NAME:
        yield from _concepts_of_name(string, last, state)
    if (state.first == "@" and kind not in ENDS) or (string == "@" and before[-1].type in ENDS):
        yield "decorator"


def _concepts_of_name(name: str, last: str, state: _Statement) -> Iterator[str]:
    if name == "self":
        yield "self"
    if name in ("True", "False", "None"):
        yield "constant"
    elif keyword.iskeyword(name):
        yield "keyword"
        return
    if last == "def":
        yield "after def"
    elif last == "class":
        yield "after class"
    if state.parameters == state.depth == 1 and last in ("(", ",", "*", "**"):
        yield "parameter"
    if state.first in ("import", "from") and last in ("import", "from", ".", ",") and not state.depth:
        yield "import"
    elif last == ".":
        yield "attribute"
    if name.endswith(("Error", "Exception")):
        yield "exception"
    if name.startswith("__") and name.endswith("__") and len(name) > 4:
        yield "dunder"


def _tokens(text: str) -> Iterator[tokenize.TokenInfo]:
    """Tokens of a piece of Python, up to where it shows that it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield from tokenize.generate_tokens(io.StringIO(text).readline)
        except (tokenize.TokenError, SyntaxError, IndentationError):
            return


def looks_like_python(store: Store, runs: Sequence[Ints], vocabulary: Vocabulary) -> bool:
    """Whether most of the first documents of these runs of neighbouring contexts are Python."""
    seen: list[str] = []
    for run in runs:
        seen += [one.text for one in documents(store, run[:1], vocabulary)]
        if len(seen) >= SAMPLE:
            break
    return is_python(seen[:SAMPLE])


def is_python(texts: Sequence[str]) -> bool:
    """Whether most of these texts are Python, as Python's own parser says."""
    return 2 * sum(map(_parses, texts)) > len(texts)


def parsed_length(text: str) -> int:
    """How many characters from the start on are Python: all; of a text that was cut, those before one of its last
    lines at the margin; 0 of one that is no Python."""
    if _parses(text):
        return len(text)
    margins = [line.start() for line in re.finditer(r"^\S", text, re.MULTILINE)]
    return next((start for start in margins[: -MOST_MARGINS - 1 : -1] if _parses(text[:start])), 0)


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # A line of prose may be a name alone; source has statements.
            return any(not isinstance(one, ast.Expr) for one in ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
